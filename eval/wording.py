"""Patterns of how answers are worded, in English and Chinese.

Patterns named *_LEFT are searched in the part of the sentence before a mention of an option and end
at the mention; those named *_RIGHT are matched to the part after it. Both parts are lower case.
"""

from __future__ import annotations

import re

MARKUP = re.compile(
    r"~~[^~]*~~|[*`$]|__|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|</?(?:b|i|em|strong|u|s)>|<\|(?!im_start)\w+\|>"
    r"|\\[()\[\],;]|\\(?=%)|\\(?:quad|boldsymbol)\b"
)
"""Emphasis, end tokens and LaTeX spacing, which are removed."""
FINAL_HEADING = re.compile(
    r"\W*(?:final |最[终后])?(?:answer|response|conclusion|答案)\b", re.IGNORECASE
)
SIGNS = str.maketrans(
    dict.fromkeys("✔✅☑√👍", "✓") | dict.fromkeys("✘✖❌❎☒☐👎", "✗") | {"🅰": "A", "🅱": "B"}
)
"""Ticks, crosses and boxed letters, each kind written in one way."""
BOXES = re.compile(
    r"(?P<yes>\[[xX✓]\]|\|[ \t]*(?:correct|yes|right|true|best|accepted|chosen|most (?:likely|appropriate)"
    r"|正确|对|是)\b[^|\n]*)|\[ \]|×(?=\s*$)|"
    r"\|[ \t]*(?:no\b|not\b|incorrect|wrong|false|inappropriate|unlikely|excluded|ruled out|rejected|不|错|否)[^|\n]*",
    re.IGNORECASE | re.MULTILINE,
)
"""Boxes and cells of a table that say yes or no, which are read as a tick or a cross."""
SIGN_FIRST = re.compile(r"(?m)^([\s•>|-]*)([✓✗].*)")
"""Line whose ticks and crosses stand before the options."""
SIGNED = re.compile(r"([✓✗])([^✓✗]+)")
EMOJI = re.compile("[☀-✒✙-➿⬀-⯿\U0001f000-\U0001faff\ufe0f]")
CERTAINTY = re.compile(
    r"\b(?:there (?:is|can be|is really) |i have |it is )?(?:no|without(?: a| any)?|beyond(?: a| any| all)?"
    r"|hardly any|little|isn't any|is not any) (?:shadow of a )?(?:doubt|question about (?:it|that))(?: that| about (?:it|that))?\b[,:]?|(?:毫无疑问|无疑|毫无疑义)[,:]?",
    re.IGNORECASE,
)
"""Assurance, which is removed so that it does not read as doubt."""
RUN_ON = re.compile(
    r"\n\W*(?:(?:next |new |another )?question(?: \d+)?|user|human|assistant|q|题目|问题|用户)(?: ?\d+)?\s*[:.\n】\]]"
    r"|<\|im_start\|>",
    re.IGNORECASE,
)
"""Starts another question or turn, which the model made up."""
FIELD = re.compile(
    r"""["'](?:\w*answer\w*|(?:\w+_)?(?:choice|option|letter)|prediction|selected|答案|选项)["']\s*:\s*"""
    r"""(?P<json>"[^"]*"|'[^']*'|\[[^\]]*\]|\{[^}]*\}|[^,}\n]*)"""
    r"""|boxed\s*\{(?P<boxed>[^{}]*)\}|<(?P<tag>(?:final_?)?(?:answer|choice|option))>"""
    r"""(?P<tagged>[^<]*)</(?P=tag)>""",
    re.IGNORECASE,
)
"""Field of the response that holds the answer alone."""
LATEX = re.compile(r"\\(?:text(?:bf|it|rm|sf)?|math(?:rm|bf|sf|it))\s*\{([^{}]*)\}")

LABEL = re.compile(
    r"(?:\b(?P<prefix>(?:answer )?(?:option|choice|letter)|"
    r"选项)\s*)?(?P<open>[(\[{<\"'“‘【「《]{0,4})"
    r"(?<![A-Za-z0-9°/.-])(?<![A-Za-z]['’])(?P<letter>[A-Za-z])(?![A-Za-z0-9°/&+²]|['’][A-Za-z]|"
    r"[型族组群超]|细胞|淋巴)"
    r"(?P<close>[)\]}>\"'”’】」》]*)(?:选?项)?",
    re.IGNORECASE,
)
"""A single letter, with the brackets or quotes around it."""
NAME_PREFIX = re.compile(
    r"(?:\b(?:vitamins?|hepatitis|types?|groups?|plan|dr|stage|class|grade|influenza|figure|fig|"
    r"table|factor|protein|part|section|appendix|coenzyme|immunoglobulin|phase|category|"
    r"apolipoprotein|complex|scenario|patient|"
    r"case)\.?|[\d°])[ \t]*\Z",
    re.IGNORECASE,
)
"""Precedes a letter that belongs to a name or a number: "vitamin C", "38.7 C"."""
LONE_LETTER = re.compile(r"(?<![a-z0-9'’])[a-z](?![a-z0-9])")
ARTICLE = re.compile(r"^(?:the|an?) (?!.*(?<![a-z0-9'’])[b-hj-z](?![a-z0-9]))")
"""Article that starts an option's words; not the A of "A and B"."""
_LETTER = r"""\s*(?:options?\s*)?[("']*[A-Z](?![A-Za-z0-9'’/-])[)"']*"""
MORE_LETTERS = re.compile(
    rf"(?:\s*[,、]{_LETTER}){{0,12}}(?:\s*,)?\s*(?:and|or|nor|to|through|&|和|或|与|及){_LETTER}"
    rf"|(?:\s*[,、]{_LETTER}){{1,12}}(?=\s*(?:[.;:!?)\]}}\"'\n。]|$|(?:are|both|all)\b|项?[都均三两可不错]))"
)
"""Further letters after the first of a list: "A and C"."""
BETWEEN = re.compile(
    r"\s*(?:[,;]\s*)?(?:(?:and|or|nor|versus|vs\.?|和|或|、)\s*)?(?:for [\w -]{1,30} )?(?:an? |"
    r"the )?"
)
"""Separates the options' words in a list: "aspirin, or heparin"."""
IN_LIST = re.compile(r"\s*(?:\([^()]*\)\s*)?(?:[,、]\s*)?(?:and|or|nor|和|或|与)?\s*(?:not )?")
"""Separates the options of a list, each perhaps with a remark."""
LABEL_GAP = re.compile(r"([\s.):,\-–—\"'(=\]为是]*)((?:the|an?) )?")
"""Separates a letter from its option's own words."""
NEXT_LINE = re.compile(r"[^\n]*\n(?:[^\n]+\n)?[\s•>#-]*")
"""Separates the labels of a list with one option a line, each perhaps with a comment."""
LOWER_CASE = re.compile(
    r"[b-hj-z]|"
    r"a(?:[.!)](?:\s|$)|,\s|(?= because\b|选?项))|(?:(?<=[:=>\n一-鿿])|(?<=[:=>] )|(?<![\s\S])|(?<=is )(?!a))[a-z]\s*(?:$|\n)"
)
"""A lower-case letter that stands for an option, rather than for an article or a cut word."""
NUMBERING = re.compile(r"\(?[a-z][).]\s")
"""Small letter that numbers an item of a list."""
FOLLOWS = re.compile(
    r"\s*(?:$|[\n,;:!?()\[\]{}<>|=\"'”’–—…。、/✓✗]|-\s|\.(?!\s?[a-z])|[一-鿿])|(?:\.?\s+(?:because|"
    r"since|as|due|given|which|and|or|but|for|is|are|was|would|based|with|from|according|rather|"
    r"instead|not|out|over|must|most|more|here|so|the|this|it|has|by|in|on|best|represent\w*|"
    r"correspond\w*|therefore|option|choice|correct|right|makes?|fits?|seems)|\s+(?!cells|vitamins|waves|lymphocytes|"
    r"fibers|strains)[a-z]+(?<![uias])s)\b"
)
"""Follows a letter that stands for an option; not as in "A patient", "C. difficile", "B-cell"."""
PRONOUN = re.compile(
    r"[ \t]+(?!(?:is|because|since|as|due|given|which|and|or|but|best|fits|seems|based|in|appears|"
    r"rather|instead|makes|it|(?:would|must) be (?:the|correct|right))\b)[a-z']"
)
"""Follows an I that is the pronoun."""
SETS_OFF = re.compile(
    r"\s*(?:$|[.,:;)](?=\s|$)|[,:;!。、—–(]|-\s|\s(?:because|since|as|due|for sure|obviously|"
    r"rather than|instead of|(?:and )?not)\b)"
)
"""Follows a letter that stands alone at the start of a line."""
STANDS_APART = re.compile(SETS_OFF.pattern + r"|[}\"']")
"""Follows common words, such as "no", where they stand for an option."""

_FILLER = (
    r"(?:[\s\"'“”‘’(\[{<>=~:,|#–—-]|(?<![a-z])(?:the|an?|option|choice|letter|answer|most likely|"
    r"likely|probably|clearly|surely|definitely|certainly|therefore|thus|hence|so|indeed|simply|"
    r"then|best|correct|single|it's|it is|ans|i(?:'d)? (?:believe|think|say)|in fact|actually|"
    r"to|again|ultimately|overall|still|that|in (?:conclusion|summary|short))(?![a-z]))*$"
)
LEADS_IN = re.compile(_FILLER)
_IS = r"(?:\bis\b|\bare\b|\bbe\b|\bwas\b|'s\b|\bremains\b)"
CLAIM_LEFT = re.compile(
    r"(?<![a-z])(?<!to )(?:answers?|ans|choice|option|selection|pick|response|conclusion|diagnosis|"
    r"solution|key|correct|verdict|"
    rf"final|result|prediction)(?![a-z])(?:[^\n]{{0,110}}?(?:{_IS}|[:=→]|->)|\.){_FILLER}"
    r"|(?<![a-z])(?:best|likely|appropriate|treatment|management|therapy|drug|agent|step|test|"
    r"cause|explanation|mechanism|statement|exception|finding|organism|one|match|fit|"
    rf"letter)(?![a-z])[^\n]{{0,110}}?{_IS}{_FILLER}"
    r"|\b(?:choos|pick|select|go(?:es|ing)? (?:with|for)|opt(?:s|ed|ing)? for|vote for|settl\w+ on|goes to|switch(?:ing)? to|"
    r"conclud|i(?:'d| would)? sa(?:id|y)|lean(?:ing)? (?:to|towards?)|(?:has|have|got) to b|must b|"
    r"i (?:think|believe|guess|"
    rf"suspect))(?:e|es|ed|ing|s)?{_FILLER}"
    rf"|(?:(?:final|my|correct|right|best|i(?:'d| would)?)\s+answer|^\W*answer)(?: with)?{_FILLER}"
    r"|boxed\s*\{?\s*$|<(?:final|answer|final_answer|choice|option)>\s*$"
    rf"|(?<!not )\bonly{_FILLER}"
    r"|(?:答案|正确|最佳|最可能|最合适|最恰当|诊断|结论)[^。!?\n;]{0,40}?(?:是|为|选|"
    r":)[\s\"'“(\[【「]*$"
    r"|(?:更正|改[为选]|(?<!不)应[该当]?[是为])\s*:?(?:应[该当]?[是为选])?[\s\"'“(\[【「]*$"
    r"|(?:答案?[\s:】]*|(?<![不勿未非别挑])选(?:择|定|用)?(?:答案)?\s*:?)[\s\"'“(\[【「]*$"
)
"""Precedes an option that is claimed to be the answer."""
EXPLICIT_RIGHT = re.compile(
    r"[^.!?\n]{0,60}?\b(?:is|as) (?:\w+ly |therefore )?(?:the|my|our) (?:\w+ ){0,2}(?:answer|exception|option|choice)\b"
)
WEAK_LEFT = re.compile(
    r"(?:\b(?:so|but|thus|therefore|hence|leaving|leaves|left with|points? to|match(?:es)?|"
    r"corresponds? to|consistent with|fits?|supports?|suggests?|indicates?|favou?rs?|i\.e\.|namely|"
    r"\w+ly|equals|by|called|known as|termed|must be|(?:it|that|this|which|there)'?s|(?<!so )is)|"
    rf"^\W*(?:give|start|administer|prescribe|use)\b|[=∴⇒→]|=>|所以|因此|故|是|为){_FILLER}"
)
"""Precedes an option that the sentence arrives at, which is weaker than a claim."""

_VERDICT = (
    r"(?:correct|right|true|best(?! known| seen| avoided| treated)|only (?:correct|option|choice|"
    r"answer|one)|(?:final )?answer|exception|(?:false|incorrect|wrong|untrue) (?:statement|one)|"
    r"odd one|left(?=\s*[.,!]|$)|(?:a )?better|more (?:likely|appropriate|consistent|plausible|"
    r"suitable|probable)|\w+ of choice(?! (?:for|in|when|if)\b)|most (?:likely|appropriate|"
    r"consistent|accurate|suitable|probable|plausible|reasonable|fitting|compelling|correct)|"
    r"one that)\b"
)
CLAIM_RIGHT = re.compile(
    r"[\s.):,-]*(?P<gap>[^.!?\n]{0,80}?)(?:\b(?:is|are|was|(?:would|must|should|has to) be|seems|"
    r"appears|remains|being|as)\b|[:–—(-])\s*(?:clearly|therefore|thus|indeed|still|probably|"
    r"likely|definitely)?\s*(?:the|our|my|your)?\s*(?:single\s+)?"
    rf"{_VERDICT}|,? (?:as |is )?(?:the|our|my) (?:single )?{_VERDICT}"
    r"|\s*(?:(?:correct|right)$|(?:fits|explains|matches) (?:best|better)\b|best (?:fits|explains|describes|matches|accounts)|makes the most sense|(?:most|"
    r"more) (?:likely|probable|plausible)\b|it is\b)"
    r"|(?P<cngap>[^。!?\n;,]{0,30}?)(?:是|为)?(?:正确|对的|最佳|最合适|最符合|符合|最可能|首选|"
    r"对(?=[,。;]|$))"
)
"""Follows an option that is claimed to be the answer, unless DENIED_GAP is found in the gap."""
DENIED_GAP = re.compile(
    r"\b(?:not|incorrect|wrong|but|while|whereas|although|than|if|unlike|never|cannot)\b|n't\b|不|"
    r"错|非"
)

DENIED_LEFT = re.compile(
    r"(?:\b(?:not|never|cannot|neither|nor|no longer|rul(?:e|es|ed|ing) out|exclud\w+|eliminat\w+|"
    r"reject\w*|discard\w*|dismiss\w*|rather than|instead of|than|over|against|avoid\w*|unlike)|"
    r"n't)(?:\s+[\w'-]+){0,3}[\s(\"'\[]*$"
    r"|(?:\b(?:not|never|neither)|n't)\b[^,;]*\b(?:or|nor)(?:\s+\w+){0,2}\s*$"
    r"|(?:\bnot|n't|\bhardly|\bnever)\s+(?:think|believe|say|agree|mean|sure|certain|convinced|"
    r"claim|conclude|confirm)\b"
    r"|\bdoubt\b|\bnone of\b|\b(?:incorrect|wrong|inaccurate|other|another|each|every|any|either|"
    r"tempting|distractor|previous|first|initial)\s+(?:answer|choice|option|guess)(?: choice)?s?\b"
    r"|(?:不是|不选|排除|并非|而非|不应选|不能选|不会是|除了?)\s*(?:选项)?\s*[(\"']*$"
)
DENIED_RIGHT = re.compile(
    r"[\s.,):–—-]*(?:\([^)]*\)\s*)?(?:[^.,;!?]{0,60}\band )?\b(?:(?:(?:is|are|was|were|be|been|seems|looks|can|could|should|would|all|"
    r"therefore|also|both)\s+){0,4}(?:\w+ly\s+)?(?:incorrect|wrong|false|inappropriate|unlikely|unsafe|dangerous"
    r"|ruled out|excluded|eliminated|crossed off|out\b|inconsistent|contraindicated|a distractor|the least)"
    r"|(?:is|are|was|would be) less\b|(?:is|are|was|were|would|can|could|should|has|have|does|do|did)(?:n't| not)\b"
    r"|cannot\b|ha(?:s|ve) no (?:role|place|effect|benefit)|or (?:maybe|perhaps) not)"
    r"|[^。,;\n而]{0,20}?(?:不(?:正确|对|符合|是|能|适|宜|支持)|错误|有误|排除|不选|禁|鉴别)"
)
SUPPOSED = re.compile(
    r"\b(?:if|had|were|unless|suppose|assuming|without)\b.*\b(?:would|could|might)\b"
    r"|\b(?:would|could|might)\b.*\b(?:if|had|were|unless)\b"
    r"|\b(?:some|many|students?|people|one|you|others)\s+(?:\w+ly\s+|also\s+)?(?:might|may|would|"
    r"could|often|commonly)\b"
    r"|\b(?:students?|many|some|people|others|textbooks|authors)\s+(?:\w+\s+)?(?:choose|give|prefer|pick|select|answer|think|say|"
    r"believe)\b"
    r"|\bcommon (?:error|pitfall|misconception|mistake)|\bby mistake|\btempt|\btrap\b|\bat first\b|"
    r"\binitially\b"
    r"|\bfirst (?:thought|instinct|impression)|\bwhether\b|^\W*if\b[^,]*_|\bwith the letter of\b"
    r"|^\W*(?:if|when|in case) (?!i\b|we\b|you had|forced|pressed)[^,]*,.*_"
    r"|_[\s.,):]*(?:is|as|was) (?:the |a )?[\w -]{0,30}?\b(?:if|when|unless|only (?:in|for|with|after|by))\b"
    r"|如果|假如|否则|(?:无法|不能|难以|很难)(?:判断|确定|选择|说)[^,;]*_|\botherwise _|还是 _|_ 还是"
)
"""Found in a sentence that is hypothetical or reports what others think."""
UNSURE = re.compile(
    r"\b(?:cannot|can't|unable|insufficient|don't know|do not know|unclear|unsure|not (?:sure|"
    r"certain|possible|able|enough)|whether|need more|no (?:single|clear|correct|"
    r"definitive) (?:answer|option)|consider(?:ed)?|differential|possib\w+|already|history|family|"
    r"takes|taking|need to know|declined|refused|diagnosed|died|mother|father|sister|brother)\b"
    r"|请看|先看|无法|不确定|不能确定|不清楚|难以|已|服用|曾|死于"
)
EXAMPLE_LEFT = re.compile(
    r"\b(?:such as|including|like|distinguish\w*|differentiat\w*|compared (?:to|with)|others?|"
    r"while|whereas|although|in contrast|unlike)\b[^;]*$|\bbefore\b[^,;]*$"
)
"""Precedes an option that is mentioned only as an example or for contrast."""
ENDORSEMENT = re.compile(
    r"\b(?:best|correct|usual|preferred|recommend\w*|prescribe|indicated|appropriate|reasonable|safe|first-line|"
    r"choice|should|needs?|needed|want|receives?|must|only|can be used|(?:would|'d) (?:\w+ )?(?:give|use|choose|start|order)|treated with|"
    r"stands? out|fits|explain(?:s|ed)|diagnosis|cause[sd]? (?:is|by|of)|culprit|consistent with|results? from|suggests?|"
    r"supports?|points? to|likely|typical|characteristic|hallmark|signs? of|is having|confirms?|proves?|establish\w*|(?:i|we|you)(?: would|'d)|organism|pathogen|suffers from|until proven otherwise|by far)\b"
    r"|由|属于|首选|考虑|宜"
)
"""Found in a sentence that recommends the only option in it."""
TURN = re.compile(
    r";|\b(?:while|although|though|whereas|despite|unlike)\b[^,;]*,|\b(?:but|however|yet|though|so|"
    r"therefore|thus)\b"
    r"|但|然而|所以|因此"
)
"""Starts a clause that an earlier denial or hypothesis does not apply to."""
SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[。!?\n]")
CORRECTION = re.compile(
    r"\b(?:wait|actually|no(?=[,:;.])|sorry|oops|apolog\w+|correction|corrected|correct myself|strike that|scratch that|"
    r"hold on|take (?:that|it) back|second thoughts?|reflection|further (?:review|thought)|i meant?|make that|edit(?=:)|rather(?=,)|"
    r"revis\w+|reconsider\w*|again|mistake\w*|chang\w+|switch)\b|更正|不对|不,|等等|抱歉|改|再看",
    re.IGNORECASE,
)
"""Introduces a correction; what follows is read by itself."""
TURNS_TO = re.compile(
    r"\b(?:however|but|yet|instead|rather|so|therefore|thus|hence)\b|但|所以|因此|故", re.IGNORECASE
)
"""Stands between two claims of which the second one counts."""
CONCLUDES = re.compile(
    r"\b(?:therefore|hence|thus|so|i would|in (?:summary|conclusion|short)|overall|all in all|taken together|"
    r"altogether)\b|所以|因此|综上|故"
)
"""Found in a sentence that draws the conclusion from the ones before."""
COMMON_WORDS = re.compile("yes|no|maybe|none|all|both|true|false|n/a|never|always|是|否")
"""Options that occur as words in any text; they count only where STANDS_APART follows."""

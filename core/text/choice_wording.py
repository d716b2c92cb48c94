"""Patterns of how answers are worded, in English and Chinese.

Patterns named *_LEFT are searched in the part of the sentence before a mention of an option and end
at the mention; those named *_RIGHT are matched to the part after it. Both parts are lower case.
"""

from __future__ import annotations

import re


def _any(lines: str) -> str:
    """Pattern of the alternatives in `lines`, one or more a line."""
    return f"(?:{'|'.join(line.strip() for line in lines.strip().splitlines())})"


MARKUP = re.compile(
    _any(r"""
        ~~[^~]*~~|[*`$]|__|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])
        </?(?:b|i|em|strong|u|s)>|<\|(?!im_start|user|start_header)\w+\|>
        \\[()\[\],;]|\\(?=%)|\\(?:quad|boldsymbol)\b
    """)
)
"""Emphasis, deletions, end tokens and LaTeX spacing, which are removed."""
LATEX = re.compile(r"\\(?:text(?:bf|it|rm|sf)?|math(?:rm|bf|sf|it))\s*\{([^{}]*)\}")
FINAL_HEADING = re.compile(r"(?i)\W*(?:final |最[终后])?(?:answer|response|conclusion|答案)\b")
"""Heads the final response where the exact heading is missing."""
CERTAINTY = re.compile(
    r"(?i)\b(?:there (?:is|can be) |i have )?"
    + _any(r"""
        (?:no|hardly any|little|isn't any) doubt
        (?:without|beyond)(?: an?y?)? (?:shadow of a )?doubt
        no question about (?:it|that)
    """)
    + r"(?: that| about (?:it|that))?\b[,:]?|(?:毫无|无)疑[问义]?[,:]?"
)
"""Assurance, which is removed so that it does not read as doubt."""
SIGNS = str.maketrans(
    dict.fromkeys("✔✅☑√👍", "✓") | dict.fromkeys("✘✖❌❎☒☐👎", "✗") | {"🅰": "A", "🅱": "B"}
)
"""Ticks, crosses and boxed letters, each kind written in one way."""
TICKS = re.compile(
    r"(?i)\[[x✓]\]|\|[ \t]*"
    r"(?:correct|yes|right|true|best|accepted|chosen|most \w+|正确|对|是)\b[^|\n]*"
)
CROSSES = re.compile(
    r"(?im)\[ \]|×(?=\s*$)|\|[ \t]*"
    + _any(r"""
        (?:no|not|incorrect|wrong|false|inappropriate|unlikely|excluded|ruled out|rejected)\b
        不|错|否
    """)
    + r"[^|\n]*"
)
"""Boxes and cells of a table that say yes or no."""
SIGN = re.compile("[✓✗]")
SIGN_FIRST = re.compile(r"(?m)^([\s•>|-]*)([✓✗].*)")
"""Line whose ticks and crosses stand before the options."""
SIGNED = re.compile(r"([✓✗])([^✓✗]+)")
EMOJI = re.compile("[☀-✒✙-➿⬀-⯿\U0001f000-\U0001faff\ufe0f]")
RUN_ON = re.compile(
    r"(?i)\n\W*"
    + _any(r"""
        (?:next |new |another )?question|user|human|assistant|q
        题目|问题|用户
    """)
    + r" ?\d*\s*[:.\n】\]]|<\|(?:im_start|user|start_header_id)\|>"
)
"""Starts another question or turn, which the model made up."""
FIELD = re.compile(
    _any(r"""
        ["'](?:\w*answer\w*|(?:\w+_)?(?:choice|option|letter)|prediction|selected|答案|选项)["']\s*:\s*("[^"]*"|'[^']*'|\[[^\]]*\]|\{[^}]*\}|[^,}\n]*)
        boxed\s*\{([^{}]*)\}
        <(?:final|(?:final_)?(?:answer|choice|option))>([^<]*)
    """),
    re.IGNORECASE,
)
"""Field of the response that holds the answer alone."""

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
    r"(?i)(?:\b"
    + _any(r"""
        vitamins?|hepatitis|types?|groups?|plan|dr|stage|class|grade|influenza|figure|fig|table
        factor|protein|part|section|appendix|coenzyme|immunoglobulin|phase|category
        apolipoprotein|complex|scenario|patient|case
    """)
    + r"\.?|[\d°])[ \t]*\Z"
)
"""Precedes a letter that belongs to a name or a number: "vitamin C", "38.7 C"."""
LONE_LETTER = re.compile(r"(?<![a-z0-9'’])[a-z](?![a-z0-9])")
ARTICLE = re.compile(r"^(?:the|an?) (?!.*(?<![a-z0-9'’])[b-hj-z](?![a-z0-9]))")
"""Article that starts an option's words; not the A of "A and B"."""
_LETTER = r"""\s*(?:options?\s*)?[("']*[A-Z](?![A-Za-z0-9'’/-])[)"']*"""
MORE_LETTERS = re.compile(
    rf"(?:\s*[,、]{_LETTER}){{0,12}}(?:\s*,)?\s*(?:and|or|nor|to|through|&|和|或|与|及){_LETTER}"
    rf"|(?:\s*[,、]{_LETTER}){{1,12}}"
    r"(?=\s*(?:[.;:!?)\]}\"'\n。]|$|(?:are|both|all)\b|项?[都均三两可不错]))"
)
"""Further letters after the first of a list: "A and C"."""
BETWEEN = re.compile(
    r"\s*(?:[,;]\s*)?(?:(?:and|or|nor|versus|vs\.?|和|或|、)\s*)?(?:for [\w -]{1,30} )?(?:an? |"
    r"the )?"
)
"""Separates the options' words in a list: "aspirin, or heparin"."""
IN_LIST = re.compile(r"\s*(?:\([^()]*\)\s*)?(?:[,、]\s*)?(?:and|or|nor|和|或|与)?\s*(?:not )?")
"""Separates the options of a list, each perhaps with a remark."""
LABEL_GAP = re.compile(r"[\s.):,\-–—\"'(=\]为是]*(?:(?:the|an?) )?")
"""Separates a letter from its option's own words."""
NEXT_LINE = re.compile(r"[^\n]*\n(?:[^\n]+\n)?[\s•>#-]*")
"""Separates the labels of a list with one option a line, each perhaps with a comment."""
LOWER_CASE = re.compile(
    _any(r"""
        [b-hj-z]|a(?:[.!)](?:\s|$)|,\s|(?= because\b|选?项))
        (?:(?<=[:=>\n一-鿿])|(?<=[:=>] )|(?<![\s\S])|(?<=is )(?!a))[a-z]\s*(?:$|\n)
    """)
)
"""A lower-case letter that stands for an option, rather than for an article or a cut word."""
FOLLOWS = re.compile(
    _any(r"""
        \s*(?:$|[\n,;:!?()\[\]{}<>|="'”’–—…。、/✓✗]|-\s|\.(?!\s?[a-z])|[一-鿿])
        \.?\s+(?:because|since|as|due|given|which|and|or|but|for|is|are|was|would|based|with|from)\b
        \.?\s+(?:according|rather|instead|not|out|over|must|most|more|here|so|the|this|it|has|by)\b
        \.?\s+(?:in|on|best|represent\w*|correspond\w*|therefore|option|choice|correct|right)\b
        \.?\s+(?:makes?|fits?|seems)\b
        \s+(?!cells|vitamins|waves|lymphocytes|fibers|strains)[a-z]+(?<![uias])s\b
    """)
)
"""Follows a letter that stands for an option; not as in "A patient", "C. difficile", "B-cell"."""
PRONOUN = re.compile(
    r"[ \t]+(?!"
    + _any(r"""
        is|because|since|as|due|given|which|and|or|but|best|fits|seems|based|in|appears
        rather|instead|makes|it|(?:would|must) be (?:the|correct|right)
    """)
    + r"\b)[a-z']"
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
    r"(?:[\s\"'“”‘’(\[{<>=~:,|#–—【「-]|(?<![a-z])"
    + _any(r"""
        the|an?|option|choice|letter|answer|most likely|likely|probably|clearly|surely|definitely
        certainly|therefore|thus|hence|so|indeed|simply|then|best|correct|single|it's|it is|ans
        i(?:'d)? (?:believe|think|say)|in fact|actually|to|again|ultimately|overall|still|that
        in (?:conclusion|summary|short)
    """)
    + r"(?![a-z]))*$"
)
LEADS_IN = re.compile(_FILLER)
_IS = r"(?:\bis\b|\bare\b|\bbe\b|\bwas\b|'s\b|\bremains\b)"
_ANSWER = _any(r"""
    answers?|ans|choice|option|selection|pick|response|conclusion|diagnosis|solution|key|correct
    verdict|final|result|prediction
""")
_ASKED = _any(r"""
    best|likely|appropriate|treatment|management|therapy|drug|agent|step|test|cause|explanation
    mechanism|statement|exception|finding|organism|one|match|fit|letter
""")
_DECIDES = _any(r"""
    choos|pick|select|go(?:es|ing)? (?:with|for)|opt(?:s|ed|ing)? for|vote for|goes to
    settl\w+ on|switch(?:ing)? to|conclud|i(?:'d| would)? sa(?:id|y)|lean(?:ing)? (?:to|towards?)
    (?:has|have|got) to b|must b|i (?:think|believe|guess|suspect)
""")
CLAIM_LEFT = re.compile(
    _any(rf"""
        (?<![a-z])(?<!to ){_ANSWER}(?![a-z])(?:[^\n]{{0,110}}?(?:{_IS}|[:=→]|->)|\.)
        (?<![a-z]){_ASKED}(?![a-z])[^\n]{{0,110}}?{_IS}
        \b{_DECIDES}(?:e|es|ed|ing|s)?
        (?:(?:final|my|correct|right|best|i(?:'d| would)?)\s+answer|^\W*answer)(?: with)?
        (?<!not )\bonly
        (?:答案|正确|最佳|最可能|最合适|最恰当|诊断|结论)[^。!?\n;]{{0,40}}?(?:是|为|选|:)
        (?:更正|改[为选]|(?<!不)应[该当]?[是为])\s*:?(?:应[该当]?[是为选])?
        (?:答案?】?|(?<![不勿未非别挑])选(?:择|定|用)?(?:答案)?)(?!,)
    """)
    + _FILLER
)
"""Precedes an option that is claimed to be the answer."""
EXPLICIT_RIGHT = re.compile(
    r"[^.!?\n]{0,60}?\b(?:is|as) (?:\w+ly |therefore )?(?:the|my|our) (?:\w+ ){0,2}"
    r"(?:answer|exception|option|choice)\b"
)
"""Follows an option that is announced as the answer."""
WEAK_LEFT = re.compile(
    _any(r"""
        \b(?:so|but|thus|therefore|hence|leaving|leaves|left with|points? to|match(?:es)?)
        \b(?:corresponds? to|consistent with|fits?|supports?|suggests?|indicates?|favou?rs?|i\.e\.)
        \b(?:namely|\w+ly|equals|by|called|known as|termed|must be|(?<!so )is)
        \b(?:it|that|this|which|there)'?s
        ^\W*(?:give|start|administer|prescribe|use)\b
        [=∴⇒→]|=>|所以|因此|故|是|为
    """)
    + _FILLER
)
"""Precedes an option that the sentence arrives at, which is weaker than a claim."""

_DEGREE = (
    "(?:likely|appropriate|consistent|plausible|suitable|probable|accurate|reasonable|fitting"
    "|compelling|correct)"
)
_VERDICT = _any(rf"""
    (?:correct|right|true|best(?! known| seen| avoided| treated)|(?:final )?answer|exception)\b
    (?:only (?:correct|option|choice|answer|one)|odd one|(?:a )?better|one that)\b
    (?:false|incorrect|wrong|untrue) (?:statement|one)\b|left\b(?=\s*[.,!]|$)
    (?:more|most) {_DEGREE}\b|\w+ of choice\b(?! (?:for|in|when|if)\b)
""")
CLAIM_RIGHT = re.compile(
    r"[\s.):,-]*(?P<gap>[^.!?\n]{0,80}?)"
    r"(?:\b(?:is|are|was|(?:would|must|should|has to) be|seems|appears|remains|being|as)\b|[:–—(-])"
    r"\s*(?:clearly|therefore|thus|indeed|still|probably|likely|definitely)?"
    rf"\s*(?:the|our|my|your)?\s*(?:single\s+)?{_VERDICT}"
    rf"|,? (?:as |is )?(?:the|our|my) (?:single )?{_VERDICT}"
    r"|\s*"
    + _any(r"""
        (?:correct|right)$|(?:fits|explains|matches) (?:best|better)\b|makes the most sense
        best (?:fits|explains|describes|matches|accounts)|it is\b
        (?:most|more) (?:likely|probable|plausible)\b
    """)
    + r"|(?P<cngap>[^。!?\n;,]{0,30}?)(?:是|为)?"
    r"(?:正确|对的|最佳|最合适|最符合|符合|最可能|首选|对(?=[,。;]|$))"
)
"""Follows an option that is claimed to be the answer, unless DENIED_GAP is found in the gap."""
DENIED_GAP = re.compile(
    r"\b(?:not|incorrect|wrong|but|while|whereas|although|than|if|unlike|never|cannot)\b|n't\b|[不错非]"
)
DENIED_LEFT = re.compile(
    r"(?:n't|\b"
    + _any(r"""
        not|never|cannot|neither|nor|no longer|rul(?:e|es|ed|ing) out|exclud\w+|eliminat\w+
        reject\w*|discard\w*|dismiss\w*|rather than|instead of|than|over|against|avoid\w*|unlike
    """)
    + r")(?:\s+[\w'-]+){0,3}[\s(\"'\[]*$|"
    + _any(r"""
        (?:\b(?:not|never|neither)|n't)\b[^,;]*\b(?:or|nor)(?:\s+\w+){0,2}\s*$
        (?:\bnot|n't|\bhardly|\bnever)\s+(?:think|believe|say|agree|mean|sure|certain)\b
        (?:\bnot|n't|\bhardly|\bnever)\s+(?:convinced|claim|conclude|confirm)\b
        \bdoubt\b|\bnone of\b
        \b(?:incorrect|wrong|inaccurate|other|another|each|every|any|either)\s+(?:answer|choice|option)
        \b(?:tempting|distractor|previous|first|initial)\s+(?:answer|choice|option|guess)
        (?:不是|不选|排除|并非|而非|不应选|不能选|不会是|除了?)\s*(?:选项)?\s*[("']*$
    """)
)
"""Precedes an option that is said to be wrong."""
DENIED_RIGHT = re.compile(
    r"[\s.,):–—-]*(?:\([^)]*\)\s*)?(?:[^.,;!?]{0,60}\band )?\b(?:(?:"
    + _any(
        "is|are|was|were|be|been|seems|looks|can|could|should|would|all|therefore|also|both|\\w+ly"
    )
    + r"\s+){0,5}"
    + _any(r"""
        no(?=[,.;]|$)|incorrect|wrong|false|inappropriate|unlikely|unsafe|dangerous|ruled out
        excluded|eliminated|crossed off|out\b|inconsistent|contraindicated|a distractor|the least
    """)
    + "|"
    + _any(r"""
        (?:is|are|was|would be) less\b|cannot\b|or (?:maybe|perhaps) not
        (?:is|are|was|were|would|can|could|should|has|have|does|do|did)(?:n't| not)\b
        ha(?:s|ve) no (?:role|place|effect|benefit)
    """)
    + r")|[^。,;\n而]{0,20}?"
    + _any(r"""
        不(?:正确|对|符合|是|能|适|宜|支持|选)|错(?:误|(?=[,。;]|$))|有误|排除|禁|鉴别
    """)
)
"""Follows an option that is said to be wrong."""
SUPPOSED = re.compile(
    _any(r"""
        \b(?:if|had|were|unless|suppose|assuming|without)\b.*\b(?:would|could|might)\b
        \b(?:would|could|might)\b.*\b(?:if|had|were|unless)\b
        \b(?:some|many|students?|people|one|you|others)\s+(?:\w+ly\s+|also\s+)?(?:might|may|would)\b
        \b(?:some|many|students?|people|one|you|others)\s+(?:\w+ly\s+|also\s+)?(?:could|often)\b
        \b(?:students?|many|some|people|others|textbooks|authors)\s+(?:\w+\s+)?(?:choose|give|prefer)\b
        \b(?:students?|many|some|people|others)\s+(?:\w+\s+)?(?:pick|select|answer|think|say|believe)\b
        \bcommon (?:error|pitfall|misconception|mistake)|\btempt|\btrap\b|\bat first\b|\binitially\b
        \bfirst (?:thought|instinct|impression)|\bwhether\b|^\W*if\b[^,]*_|\bwith the letter of\b
        ^\W*(?:if|when|in case) (?!i\b|we\b|you had|forced|pressed)[^,]*,.*_|\botherwise _
        _[\s.,):]*(?:is|as|was) (?:the |a )?[\w -]{0,30}?\b(?:if|when|unless|only (?:in|for|with))\b
        如果|假如|否则|(?:无法|不能|难以|很难)(?:判断|确定|选择|说)[^,;]*_|还是 _|_ 还是
    """)
)
"""Found in a sentence that is hypothetical or reports what others think."""
UNSURE = re.compile(
    r"\b"
    + _any(r"""
        cannot|can't|unable|insufficient|don't know|do not know|unclear|unsure|whether|need more
        not (?:sure|certain|possible|able|enough)|consider(?:ed)?|differential|possib\w+|already
        no (?:single|clear|correct|definitive) (?:answer|option)|need to know|takes|taking
        history|family|mother|father|sister|brother|declined|refused|diagnosed|died
    """)
    + r"\b|请看|先看|无法|不确定|不能确定|不清楚|难以|已|服用|曾|死于"
)
"""Found in a sentence that doubts, or tells of the patient's past."""
EXAMPLE_LEFT = re.compile(
    _any(r"""
        \b(?:such as|including|like|distinguish\w*|differentiat\w*|compared (?:to|with))\b[^;]*$
        \b(?:others?|while|whereas|although|in contrast|unlike)\b[^;]*$|\bbefore\b[^,;]*$
    """)
)
"""Precedes an option that is mentioned only as an example or for contrast."""
ENDORSEMENT = re.compile(
    r"\b"
    + _any(r"""
        best|correct|usual|preferred|recommend\w*|prescribe|indicated|appropriate|reasonable|safe
        first-line|choice|should|needs?|needed|want|receives?|must|only|can be used|treated with
        (?:i|we|you)(?: would|'d)|stands? out|fits|explain(?:s|ed)|diagnosis|cause[sd]? (?:is|by|of)
        culprit|consistent with|results? from|suggests?|supports?|points? to|likely|typical|by far
        characteristic|hallmark|signs? of|is having|confirms?|proves?|establish\w*|organism|pathogen
        until proven otherwise|would (?:\w+ )?(?:give|use|choose|start|order)
    """)
    + r"\b|由|属于|首选|考虑|宜"
)
"""Found in a sentence that recommends the only option in it."""
TURN = re.compile(
    _any(r"""
        ;|\b(?:while|although|though|whereas|despite|unlike)\b[^,;]*,
        \b(?:but|however|yet|though|so|therefore|thus)\b|但|然而|所以|因此
    """)
)
"""Starts a clause that an earlier denial or hypothesis does not apply to."""
TURNS_TO = re.compile(
    r"(?i)\b(?:however|but|yet|instead|rather|so|therefore|thus|hence)\b|但|所以|因此|故"
)
"""Stands between two claims of which the second one counts."""
CORRECTION = re.compile(
    r"(?i)\b"
    + _any(r"""
        wait|actually|no(?=[,:;.])|sorry|oops|apolog\w+|correct(?:ion|ed| myself)|hold on|switch
        (?:strike|scratch) that|take (?:that|it) back|second thoughts?|reflection|i meant?
        further (?:review|thought)|make that|edit(?=:)|rather(?=,)|revis\w+|reconsider\w*|again
        mistake\w*|chang\w+
    """)
    + r"\b|更正|不对|不,|等等|抱歉|改|再看"
)
"""Introduces a correction; what follows is read by itself."""
CONCLUDES = re.compile(
    r"\b"
    + _any("""
        therefore|hence|thus|so|i would|in (?:summary|conclusion|short)|overall|all in all
        taken together|altogether
    """)
    + r"\b|所以|因此|综上|故"
)
"""Found in a sentence that draws the conclusion from the ones before."""
SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[。!?\n]")
COMMON_WORDS = re.compile("yes|no|maybe|none|all|both|true|false|n/a|never|always|是|否")
"""Options that occur as words in any text; they count only where STANDS_APART follows."""

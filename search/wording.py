"""Phrases that do not belong in a training text, and the length of a text in its own script."""

from __future__ import annotations

import re

CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
CHINESE_WEIGHT = 4
"""Number of characters of English that a Chinese character counts as."""


def text_length(text: str) -> int:
    """Number of characters, each Chinese one counted as CHINESE_WEIGHT."""
    return len(text) + (CHINESE_WEIGHT - 1) * len(CHINESE.findall(text))


def _any_of(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns), re.IGNORECASE)


_WRONG = r"(?:incorrect|wrong|false|mistaken|not (?:right|correct))"
_KNOWN = r"(?:given|provided|supplied|expected|reference|stated|official|known|target|intended)"
_EARLIER = r"(?:previous|earlier|last|first|prior|initial)"
LEAK = _any_of(
    # the answer as something that exists outside the reasoning
    rf"\b(?:correct|right|actual|true|label(?:l)?ed|gold|{_KNOWN}) answer\b"
    r"(?! (?:is|was) (?:not|unclear|unknown))",
    r"\b(?:the|this|that) (?:given|provided|supplied|expected|reference|target|intended) "
    r"(?:conclusion|solution|option)\b",
    r"\banswer(?: that| which)?(?: was| is|'s| has been)?(?: already)? "
    r"(?:given|provided|revealed|supplied|shown to me)\b",
    r"\banswer (?:I|we) (?:was|were|have been|had been) (?:given|shown)\b",
    r"\banswer (?:is|was) (?:supposed|meant|known|said|required) to be\b",
    r"\banswer key\b|\bground[- ]truth\b|\bgold (?:label|standard answer)\b",
    # a verdict that somebody else has passed
    r"\b(?:flagged|marked|identified|judged|deemed|reviewed|label(?:l)?ed|ruled|graded|declared) "
    rf"(?:as |to be )?{_WRONG}\b",
    rf"\b(?:said|reported|stated|noted) to be {_WRONG}\b",
    r"\b(?:conclusion|answer) (?:was|is|has been|had been|got) (?:rejected|not accepted|refused)\b",
    r"\b(?:given|knowing|know|since|because) (?:that )?(?:the|my|our) "
    rf"{_EARLIER} (?:conclusion|answer) (?:is|was|has been) {_WRONG}\b",
    # being told
    r"\bI(?:['’]ve| have| had| was|['’]m| am) (?:\w+ )?(?:been )?(?:told|informed|instructed)\b",
    r"\b(?:told|informed|instructed) (?:me|that) (?:that )?(?:the|my|our|this) "
    rf"(?:{_EARLIER} )?(?:answer|conclusion)\b",
    r"\bfeedback (?:that|on|about) (?:the|my|our|this) (?:answer|conclusion)\b",
    r"\b(?:the|this) hint (?:given|provided|says|suggests|points)\b",
    "(?:参考|标准|正确|官方|预期|目标|真实|已知的?|给定的?)(?:答案|结论)",
    "(?:给出|提供|告知|给)(?:我)?的(?:正确)?(?:答案|结论)",
    "(?:答案|结论)(?:已经?|早已)?(?:被)?(?:给出|告知|提供|揭晓)",
    "(?:既然|已知|因为知道|知道了?)(?:正确)?(?:答案|结论)(?:是|为|应)",
    "(?:被|已)(?:判定?|判断|标记?|认定|评定|指出)(?:为|是)*(?:错|不对|不正确|有误)",
    "(?:被告知|(?<!没)有人告诉|已经?告诉)(?:过)?(?:我(?!们)|答案|结论|上)",
    "(?:根据|按照?)(?:题目|系统|上面)?(?:的)?提示[，,]?(?:答案|结论|上)",
)
"""Phrases by which a text shows that the answer, or a verdict on it, was given to its writer."""

PREFACE = _any_of(
    r"\A\W*(?:certainly|sure(?: thing)?|of course|absolutely|great question|good question|hello|hi|"
    r"dear \w+|thank you for|thanks for)\b(?=[^\n.]{0,40}[!,.:])",
    r"\A\W*(?:here(?:['’]s| is| are)|below is|the following is) (?:a |an |the |my |your )?"
    r"(?:[\w-]+,? ){0,4}(?:answer|response|explanation|summary|breakdown|overview|reply)\b",
    r"\A\W*as an? (?:\w+ ){0,3}(?:AI|language model|chatbot)\b",
    r"\A\W*(?:好的|当然(?:可以)?|没问题|您好|你好|感谢(?:您|你)的)[，,。！!：:]?",
    r"\A\W*(?:以下|下面)(?:是|为)[^，。\n]{0,12}(?:回答|答案|解释|解答|说明|分析)",
    r"\A\W*作为(?:一[个名位款])?[^，。\n]{0,8}(?:AI|人工智能|语言模型|大模型|助手)",
)
"""What an assistant says before it begins to answer."""

CLOSING = _any_of(
    r"\b(?:I )?hope (?:this|that|it) (?:\w+ )?(?:helps?|is helpful|clarifies|answers)\b",
    r"\b(?:let me know|feel free to|(?:please )?(?:don['’]t|do not) hesitate to|just ask)\b",
    r"\bif (?:you have|there are) (?:any |more |further |other |additional )+questions?\b",
    r"\b(?:I|we)(?:['’](?:m|re|d be)| am| are| would be) (?:happy|glad|here) to "
    r"(?:help|assist|clarify|explain|answer)\b",
    r"\bwould you like (?:me )?to\b",
    "希望(?:这|以上|上述|我的|对您|对你|能)[^。\n]{0,20}(?:帮助|帮到|有用|有益)",
    "(?<!患者)(?:如果|如|若)(?:您|你)?(?:还)?有(?:任何|其他|其它|更多|进一步|别的)[^。\n]{0,8}(?:问题|疑问)",
    "欢迎随时|请随时(?:提问|提出|告诉|告知|联系|咨询|问)|(?:很)?(?:乐意|高兴)(?:为您|为你)?(?:继续)?(?:解答|帮助|效劳)",
    r"祝(?:您|你)[^\n]{0,12}(?:健康|康复)",
)
"""Offers and wishes at the end of an assistant's answer; looked for in its last lines."""

_IMAGE = r"(?:image|photo(?:graph|micrograph)?|illustration|diagram|exhibit|figure|karyogram)"
PICTURE = _any_of(
    r"\b(?:shown?|seen|depicted|pictured|illustrated|displayed|reproduced|provided|presented|marked|"
    r"labell?ed|indicated) (?:in|on|by|at|with|to) (?:the |this |an? )?(?:\w+ )?"
    rf"(?:{_IMAGE}|picture|arrow|graph|chart)s?\b",
    rf"\b(?:{_IMAGE}|picture|graph|x[- ]?ray|radiograph|ecg|ekg|electrocardiogram|scan|smear|film|"
    r"biopsy|specimen|tracing|lesion|finding)s?(?: is| are| was| were)?(?: as)? "
    r"(?:shown|pictured|depicted|displayed|illustrated|attached|below|above)\b"
    r"(?! (?:to|no|an?|any|signs|that)\b|(?: below| above)?:)",
    rf"\b(?:the|this) {_IMAGE}\b(?! (?:quality|guid|process|intensif))",
    rf"\b(?:following|accompanying|attached|given) (?:\w+ )?(?:{_IMAGE}|picture)s?\b",
    r"\b(?:(?:see|refer to) (?:the )?(?:\w+ )?images?|(?:see|refer to|in) (?:the )?"
    r"(?:figures?|fig\.|exhibit))\b(?! quality)",
    r"\b(?-i:(?:[Ff]ig(?:ures?|\.)|[Ii]mages?) [A-H1-9]\b)|\(shown\)",
    r"\b(?!(?:tests|values|results|labs|panel|analysis|studies|data)\b)\w+ (?:and )?(?:is|are) "
    r"shown(?: below)?\.(?=\s|$)",
    "如(?:下|上|右|左|附|所)?图|(?:参见|见)(?:下|上|右|左|附)?图",
    "(?:下|上|右|左|附|该|此)图(?:中|所|显|示|为|是|片|像)?"
    r"|(?:^|[，。；,\s])图中|图[一二三四1-9](?:所示|中)",
    "(?<![电声像谱影肌流瘤扇视心脑])图(?:中)?所示|(?:图片|照片)(?:中|所示|显示|如)",
)
"""References of a question to a picture, which a text cannot show."""


def leaked_phrase(text: str) -> str | None:
    """The first phrase of LEAK in a text."""
    return _found(LEAK, text)


def assistant_phrase(text: str) -> str | None:
    """The first phrase of PREFACE, or of CLOSING in the last two lines with text."""
    lines = [line for line in text.splitlines() if line.strip()]
    return _found(PREFACE, text) or _found(CLOSING, "\n".join(lines[-2:]))


def picture_phrase(text: str) -> str | None:
    """The first phrase of PICTURE in a question."""
    return _found(PICTURE, text)


def _found(pattern: re.Pattern[str], text: str) -> str | None:
    match = pattern.search(text)
    return match[0].strip() if match else None

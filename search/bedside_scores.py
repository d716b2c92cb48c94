"""Bedside scores as data: findings, their points, and where the points were published.

For demonstrating and testing the trainer, not for clinical use. A finding has a compact form (few words, closed
vocabulary) and a prose form. An item of a score is a tuple of levels in rising points; a level holds the findings that
earn the same points, and a patient has one finding per item. Values sit away from the published cut-offs' edges.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Finding(NamedTuple):
    compact: str
    prose: str
    points: int


Item = tuple[tuple[Finding, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Score:
    kind: str
    name: str
    """Short name, in compact questions"""
    title: str
    """Full name, in prose: fits after 'the'"""
    source: str
    items: tuple[Item, ...]


def _sign(compact: str, prose: str, points: int = 1) -> Item:
    """A sign that is absent (0 points) or present."""
    absent = (Finding(f"no {compact}", f"no {prose}", 0),)
    present = (Finding(compact, prose, points),)
    return (absent, present) if points > 0 else (present, absent)


def _measured(compact: str, prose: str, values: Mapping[int, Sequence[float | str]]) -> Item:
    """A measurement: points -> values that earn them, points rising."""
    return tuple(
        tuple(Finding(f"{compact} {value}", prose.format(value), points) for value in level)
        for points, level in values.items()
    )


def _graded(*grades: tuple[str, str, int]) -> Item:
    """Named grades with a level each, points rising."""
    return tuple((Finding(*grade),) for grade in grades)


IRRELEVANT = (
    Finding("brown eyes", "brown eyes", 0),
    Finding("dark hair", "dark hair", 0),
    Finding("born in May", "a birthday in May", 0),
    Finding("blood type A", "blood group A", 0),
    Finding("has a sister", "a healthy older sister", 0),
    Finding("lives nearby", "a home close to the hospital", 0),
)
"""In no score: 0 points, whoever the patient is"""


GLASGOW_COMA_SCALE = Score(
    kind="glasgow_coma_scale",
    name="GCS",
    title="Glasgow coma scale",
    source="Teasdale and Jennett, Lancet, 1974; 15-point form as in Teasdale et al., Lancet Neurology, 2014",
    items=(
        _graded(
            ("eyes none", "eyes that do not open", 1),
            ("eyes pain", "eyes that open only to pain", 2),
            ("eyes speech", "eyes that open to speech", 3),
            ("eyes spontaneous", "eyes that open spontaneously", 4),
        ),
        _graded(
            ("verbal none", "no verbal response", 1),
            ("verbal sounds", "incomprehensible sounds", 2),
            ("verbal words", "inappropriate single words", 3),
            ("verbal confused", "confused conversation", 4),
            ("verbal oriented", "oriented conversation", 5),
        ),
        _graded(
            ("motor none", "no motor response", 1),
            ("motor extension", "extension of the arms to pain", 2),
            ("motor flexion", "abnormal flexion to pain", 3),
            ("motor withdrawal", "withdrawal (normal flexion) from pain", 4),
            ("motor localizing", "a hand that localizes pain", 5),
            ("motor obeys", "commands that are obeyed", 6),
        ),
    ),
)

APGAR = Score(
    kind="apgar",
    name="Apgar",
    title="Apgar score",
    source="Apgar, Current Researches in Anesthesia and Analgesia, 1953",
    items=(
        _graded(
            ("skin blue", "a body that is blue all over", 0),
            ("limbs blue", "a pink body with blue hands and feet", 1),
            ("skin pink", "a body that is pink all over", 2),
        ),
        _graded(
            ("pulse none", "no heart beat", 0),
            ("pulse 80", "a heart rate of 80 per minute", 1),
            ("pulse 130", "a heart rate of 130 per minute", 2),
        ),
        _graded(
            ("reflex none", "no response to stimulation", 0),
            ("reflex grimace", "a grimace on stimulation", 1),
            ("reflex cough", "a cough or sneeze on stimulation", 2),
        ),
        _graded(
            ("tone limp", "limp muscle tone", 0),
            ("tone flexion", "some flexion of the limbs", 1),
            ("tone active", "active motion", 2),
        ),
        _graded(
            ("breathing none", "no breathing", 0),
            ("breathing slow", "slow, irregular breathing", 1),
            ("breathing strong", "good breathing with a strong cry", 2),
        ),
    ),
)

CURB65 = Score(
    kind="curb65",
    name="CURB-65",
    title="CURB-65 score",
    source="Lim et al., Thorax, 2003",
    items=(
        _sign("confusion", "new confusion"),
        _measured("urea", "a urea of {} mmol/L", {0: (4, 5, 6), 1: (9, 12, 14)}),
        _measured(
            "breaths", "a respiratory rate of {} per minute", {0: (14, 18, 24), 1: (32, 36, 38)}
        ),
        _measured(
            "pressure",
            "a blood pressure of {} mmHg",
            {0: ("130/80", "110/70"), 1: ("84/50", "96/54")},
        ),
        _measured("age", "an age of {} years", {0: (40, 50, 60), 1: (70, 80, 90)}),
    ),
)

CHA2DS2_VASC = Score(
    kind="cha2ds2_vasc",
    name="CHA2DS2-VASc",
    title="CHA2DS2-VASc score",
    source="Lip et al., Chest, 2010",
    items=(
        _sign("heart failure", "congestive heart failure"),
        _sign("hypertension", "hypertension"),
        _measured("age", "an age of {} years", {0: (40, 60), 1: (68, 72), 2: (78, 80)}),
        _sign("diabetes", "diabetes mellitus"),
        _sign("stroke", "previous stroke", 2),
        _sign("vascular disease", "vascular disease (previous myocardial infarction)"),
        _graded(("male", "male sex", 0), ("female", "female sex", 1)),
    ),
)

WELLS_DVT = Score(
    kind="wells_dvt",
    name="Wells",
    title="Wells score for deep vein thrombosis",
    source="Wells et al., New England Journal of Medicine, 2003",
    items=(
        _sign("cancer", "active cancer"),
        _sign("leg paralysis", "paralysis of the leg"),
        _sign("bed rest", "bed rest for the last five days"),
        _sign("vein tenderness", "tenderness along the deep veins of the leg"),
        _sign("leg swelling", "swelling of the entire leg"),
        _sign("calf swelling", "calf swelling of 4 cm against the other side"),
        _sign("pitting edema", "pitting edema confined to the symptomatic leg"),
        _sign("collateral veins", "collateral superficial veins that are not varicose"),
        _sign("past thrombosis", "previously documented deep vein thrombosis"),
        _sign("likely alternative", "alternative diagnosis at least as likely", -2),
    ),
)

MCISAAC = Score(
    kind="mcisaac",
    name="McIsaac",
    title="McIsaac (modified Centor) score",
    source="McIsaac et al., Canadian Medical Association Journal, 1998",
    items=(
        _measured(
            "temperature", "a temperature of {} C", {0: (36.2, 36.8, 37.4), 1: (38.6, 39.4, 40.2)}
        ),
        _graded(("cough", "a cough", 0), ("no cough", "no cough", 1)),
        _sign("tender nodes", "tender anterior cervical nodes"),
        _sign("tonsil exudate", "tonsillar exudate or swelling"),
        _measured("age", "an age of {} years", {-1: (50, 60, 70), 0: (20, 30, 40), 1: (6, 8, 12)}),
    ),
)

HAS_BLED = Score(
    kind="has_bled",
    name="HAS-BLED",
    title="HAS-BLED score",
    source="Pisters et al., Chest, 2010",
    items=(
        _measured(
            "systolic", "a systolic blood pressure of {} mmHg", {0: (120, 140), 1: (170, 180)}
        ),
        _sign("dialysis", "chronic dialysis"),
        _sign("cirrhosis", "cirrhosis of the liver"),
        _sign("stroke", "previous stroke"),
        _sign("bleeding", "previous major bleeding"),
        _graded(
            ("stable INR", "a stable INR on warfarin", 0),
            ("labile INR", "a labile INR on warfarin", 1),
        ),
        _measured("age", "an age of {} years", {0: (40, 60), 1: (70, 80)}),
        _sign("aspirin", "aspirin in the drug list"),
        _sign("alcohol", "alcohol intake of 12 drinks a week"),
    ),
)

ALVARADO = Score(
    kind="alvarado",
    name="Alvarado",
    title="Alvarado score",
    source="Alvarado, Annals of Emergency Medicine, 1986",
    items=(
        _sign("migrating pain", "migration of the pain to the right lower quadrant"),
        _sign("anorexia", "anorexia"),
        _sign("vomiting", "nausea or vomiting"),
        _sign("quadrant tenderness", "tenderness in the right lower quadrant", 2),
        _sign("rebound pain", "rebound pain"),
        _measured("temperature", "a temperature of {} C", {0: (36.2, 36.8), 1: (37.9, 38.6)}),
        _measured("leukocytes", "a leukocyte count of {} x 10^9/L", {0: (6, 8), 2: (14, 18)}),
        _sign("left shift", "left shift of the neutrophils"),
    ),
)

CHILD_PUGH = Score(
    kind="child_pugh",
    name="Child-Pugh",
    title="Child-Pugh score",
    source="Pugh et al., British Journal of Surgery, 1973",
    items=(
        _measured(
            "bilirubin", "a bilirubin of {} mg/dL", {1: (1.2, 1.6), 2: (2.4, 2.6), 3: (4, 6)}
        ),
        _measured("albumin", "an albumin of {} g/dL", {1: (3.8, 4.2), 2: (3, 3.2), 3: (2.2, 2.4)}),
        _measured(
            "prothrombin",
            "a prothrombin time prolonged by {} seconds",
            {1: (2, 3), 2: (5,), 3: (8, 9)},
        ),
        _graded(
            ("no ascites", "no ascites", 1),
            ("slight ascites", "slight ascites", 2),
            ("moderate ascites", "moderate ascites", 3),
        ),
        _measured("encephalopathy", "encephalopathy of grade {}", {1: (0,), 2: (1, 2), 3: (3, 4)}),
    ),
)

NEWS2 = Score(
    kind="news2",
    name="NEWS2",
    title="National Early Warning Score 2 (SpO2 scale 1)",
    source="Royal College of Physicians, National Early Warning Score (NEWS) 2, 2017",
    items=(
        _measured(
            "breaths",
            "a respiratory rate of {} per minute",
            {0: (14, 18), 1: (10,), 2: (22, 24), 3: (7, 32)},
        ),
        _measured(
            "saturation",
            "an oxygen saturation of {}%",
            {0: (97, 99), 1: (94, 95), 2: (92, 93), 3: (84, 88)},
        ),
        _graded(("on air", "breathing of room air", 0), ("on oxygen", "supplemental oxygen", 2)),
        _measured(
            "systolic",
            "a systolic blood pressure of {} mmHg",
            {0: (120, 140), 1: (104, 108), 2: (94, 98), 3: (80, 230)},
        ),
        _measured(
            "pulse",
            "a pulse of {} per minute",
            {0: (60, 80), 1: (46, 100), 2: (116, 124), 3: (36, 140)},
        ),
        _graded(("alert", "an alert patient", 0), ("new confusion", "new confusion", 3)),
        _measured(
            "temperature",
            "a temperature of {} C",
            {0: (36.8, 37.4), 1: (35.6, 38.6), 2: (39.4, 40.2), 3: (34.2, 34.6)},
        ),
    ),
)

BISHOP = Score(
    kind="bishop",
    name="Bishop",
    title="Bishop score",
    source="Bishop, Obstetrics and Gynecology, 1964",
    items=(
        _measured(
            "dilation", "a cervical dilation of {} cm", {0: (0,), 1: (1, 2), 2: (3, 4), 3: (5, 6)}
        ),
        _measured(
            "effacement",
            "an effacement of {}%",
            {0: (10, 20), 1: (40, 50), 2: (60, 70), 3: (80, 90)},
        ),
        _measured(
            "station",
            "a fetal station of {}",
            {0: ("-3",), 1: ("-2",), 2: ("-1", "0"), 3: ("+1", "+2")},
        ),
        _graded(
            ("cervix firm", "a firm cervix", 0),
            ("cervix medium", "a cervix of medium consistency", 1),
            ("cervix soft", "a soft cervix", 2),
        ),
        _graded(
            ("cervix posterior", "a posterior cervix", 0),
            ("cervix middle", "a cervix in mid-position", 1),
            ("cervix anterior", "an anterior cervix", 2),
        ),
    ),
)

ABCD2 = Score(
    kind="abcd2",
    name="ABCD2",
    title="ABCD2 score",
    source="Johnston et al., Lancet, 2007",
    items=(
        _measured("age", "an age of {} years", {0: (40, 50), 1: (70, 80)}),
        _measured(
            "pressure",
            "a blood pressure of {} mmHg",
            {0: ("130/80", "110/70"), 1: ("160/80", "130/96")},
        ),
        _graded(
            ("only dizziness", "dizziness without weakness or speech disturbance", 0),
            ("only speech", "speech disturbance without weakness", 1),
            ("arm weakness", "unilateral arm weakness", 2),
        ),
        _measured("minutes", "symptoms for {} minutes", {0: (4, 6), 1: (20, 40), 2: (80, 90)}),
        _sign("diabetes", "diabetes mellitus"),
    ),
)

SCORES: Mapping[str, Score] = {
    score.kind: score
    for score in (
        GLASGOW_COMA_SCALE,
        APGAR,
        CURB65,
        CHA2DS2_VASC,
        WELLS_DVT,
        MCISAAC,
        HAS_BLED,
        ALVARADO,
        CHILD_PUGH,
        NEWS2,
        BISHOP,
        ABCD2,
    )
}

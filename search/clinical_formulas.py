"""Clinical formulas as data: what is drawn, how it is worked, and where it was published.

For demonstrating and testing the trainer, not for clinical use. A formula is worked in decimal arithmetic, one binary
operation at a time, so that its lines can be shown to the letter and checked by anyone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal


class Working:
    """Carries out one binary operation at a time and keeps each as a line, such as `140 - 104 = 36`.

    A quotient that does not end within four decimals is written with `≈` and two decimals more than the answer has;
    it must be the last step, so that no error travels.
    """

    def __init__(self, num_decimals: int) -> None:
        self.lines: list[str] = []
        self.is_exact = True
        self._last_place = Decimal(1).scaleb(-num_decimals - 2)

    def __call__(self, left: Decimal | int, sign: str, right: Decimal | int | str) -> Decimal:
        assert self.is_exact, f"step after a rounded quotient: {self.lines}"
        left, right = Decimal(left), Decimal(right)
        match sign:
            case "+":
                result = left + right
            case "-":
                result = left - right
            case "x":
                result = left * right
            case _:
                result = (left / right).quantize(Decimal("0.0001"))
                self.is_exact = result * right == left
                result = result if self.is_exact else (left / right).quantize(self._last_place)
        equals = "=" if self.is_exact else "≈"
        self.lines.append(f"{plain(left)} {sign} {plain(right)} {equals} {plain(result)}")
        return result


@dataclass(frozen=True, kw_only=True)
class Formula:
    kind: str
    name: str
    unit: str
    num_decimals: int
    source: str
    rule: str
    """The formula in words, opening the prose reasoning"""
    question: str
    """Prose, with a field per input"""
    values: Mapping[str, Sequence[Decimal | str]]
    """Input -> what it is drawn from, in the units that `question` states"""
    work: Callable[..., Decimal]
    """(working, **inputs) -> the unrounded answer"""


def plain(value: Decimal) -> str:
    """Fixed-point, without trailing zeros."""
    text = format(value, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _span(low: str, high: str, step: str) -> tuple[Decimal, ...]:
    num_steps = int((Decimal(high) - Decimal(low)) / Decimal(step))
    return tuple(Decimal(low) + index * Decimal(step) for index in range(num_steps + 1))


def _maintenance_fluids(work: Working, weight: Decimal) -> Decimal:
    if weight <= 10:
        return work(weight, "x", 4)
    first_ten = work(10, "x", 4)
    if weight <= 20:
        return work(first_ten, "+", work(work(weight, "-", 10), "x", 2))
    first_twenty = work(first_ten, "+", work(10, "x", 2))
    return work(first_twenty, "+", work(work(weight, "-", 20), "x", 1))


def _creatinine_clearance(
    work: Working, age: Decimal, weight: Decimal, creatinine: Decimal, sex: str
) -> Decimal:
    numerator = work(work(140, "-", age), "x", weight)
    if sex == "female":
        numerator = work(numerator, "x", "0.85")
    return work(numerator, "/", work(creatinine, "x", 72))


def _sodium_excretion(
    work: Working,
    urine_sodium: Decimal,
    plasma_sodium: Decimal,
    urine_creatinine: Decimal,
    plasma_creatinine: Decimal,
) -> Decimal:
    excreted = work(work(urine_sodium, "x", plasma_creatinine), "x", 100)
    return work(excreted, "/", work(plasma_sodium, "x", urine_creatinine))


def _osmolality(
    work: Working, sodium: Decimal, glucose: Decimal, urea_nitrogen: Decimal
) -> Decimal:
    with_glucose = work(work(sodium, "x", 2), "+", work(glucose, "/", 18))
    return work(with_glucose, "+", work(urea_nitrogen, "/", "2.8"))


_DOSAGE = "Pickar and Abernethy, Dosage Calculations (textbook), 2012"

FORMULAS: Mapping[str, Formula] = {
    formula.kind: formula
    for formula in (
        Formula(
            kind="weight_dose",
            name="dose",
            unit="mg",
            num_decimals=1,
            source=_DOSAGE,
            rule="The dose is the ordered amount per kilogram times the weight.",
            question="A drug is ordered at {dose_per_kg} mg/kg for a patient of {weight} kg. What is the dose?",
            values={
                "dose_per_kg": tuple(
                    map(
                        Decimal,
                        (
                            "0.5",
                            "1",
                            "1.5",
                            "2",
                            "2.5",
                            "3",
                            "4",
                            "5",
                            "7.5",
                            "10",
                            "12.5",
                            "15",
                            "20",
                        ),
                    )
                ),
                "weight": _span("4", "95", "1"),
            },
            work=lambda work, dose_per_kg, weight: work(dose_per_kg, "x", weight),
        ),
        Formula(
            kind="infusion_rate",
            name="infusion rate",
            unit="mL/h",
            num_decimals=0,
            source=_DOSAGE,
            rule="The pump rate is the volume divided by the hours.",
            question="{volume} mL are to be infused over {hours} hours. What is the infusion rate?",
            values={"volume": _span("100", "3000", "50"), "hours": _span("2", "24", "1")},
            work=lambda work, volume, hours: work(volume, "/", hours),
        ),
        Formula(
            kind="drip_rate",
            name="drip rate",
            unit="drops/min",
            num_decimals=0,
            source=_DOSAGE,
            rule="The drip rate is the volume times the drops per mL, divided by the minutes.",
            question="{volume} mL are to run over {hours} hours through a set of {drops} drops/mL. "
            "What is the drip rate?",
            values={
                "volume": _span("100", "1500", "50"),
                "hours": _span("1", "12", "1"),
                "drops": tuple(map(Decimal, (10, 15, 20, 60))),
            },
            work=lambda work, volume, hours, drops: work(
                work(volume, "x", drops), "/", work(hours, "x", 60)
            ),
        ),
        Formula(
            kind="maintenance_fluids",
            name="maintenance fluid rate",
            unit="mL/h",
            num_decimals=1,
            source="Holliday and Segar, Pediatrics, 1957 (hourly 4-2-1 form)",
            rule="By the 4-2-1 rule each of the first ten kilograms needs 4 mL/h, each of the next ten 2 mL/h, and "
            "each further one 1 mL/h.",
            question="A child weighs {weight} kg. What is the maintenance fluid rate by the 4-2-1 rule?",
            values={"weight": _span("3", "50", "0.1")},
            work=_maintenance_fluids,
        ),
        Formula(
            kind="anion_gap",
            name="anion gap",
            unit="mmol/L",
            num_decimals=0,
            source="Emmett and Narins, Medicine (Baltimore), 1977",
            rule="The anion gap is sodium minus chloride minus bicarbonate.",
            question="Serum sodium is {sodium}, chloride {chloride} and bicarbonate {bicarbonate} mmol/L. "
            "What is the anion gap?",
            values={
                "sodium": _span("128", "150", "1"),
                "chloride": _span("92", "112", "1"),
                "bicarbonate": _span("8", "30", "1"),
            },
            work=lambda work, sodium, chloride, bicarbonate: work(
                work(sodium, "-", chloride), "-", bicarbonate
            ),
        ),
        Formula(
            kind="mean_arterial_pressure",
            name="mean arterial pressure",
            unit="mmHg",
            num_decimals=0,
            source="Costanzo, Physiology (textbook), 2018",
            rule="The mean arterial pressure is the systolic plus twice the diastolic pressure, divided by three.",
            question="The blood pressure is {systolic}/{diastolic} mmHg. What is the mean arterial pressure?",
            values={"systolic": _span("110", "190", "1"), "diastolic": _span("50", "90", "1")},
            work=lambda work, systolic, diastolic: work(
                work(work(diastolic, "x", 2), "+", systolic), "/", 3
            ),
        ),
        Formula(
            kind="corrected_calcium",
            name="corrected calcium",
            unit="mg/dL",
            num_decimals=1,
            source="Payne et al., BMJ, 1973; 0.8 mg/dL per g/dL as in Harrison's Principles of Internal Medicine",
            rule="The calcium is corrected by adding 0.8 mg/dL for each g/dL that albumin lies below 4.",
            question="Total calcium is {calcium} mg/dL and albumin {albumin} g/dL. What is the corrected calcium?",
            values={"calcium": _span("7", "11", "0.1"), "albumin": _span("1.5", "3.9", "0.1")},
            work=lambda work, calcium, albumin: work(
                work(work(4, "-", albumin), "x", "0.8"), "+", calcium
            ),
        ),
        Formula(
            kind="corrected_sodium",
            name="corrected sodium",
            unit="mmol/L",
            num_decimals=0,
            source="Katz, New England Journal of Medicine, 1973",
            rule="The sodium is corrected by adding 1.6 mmol/L for each 100 mg/dL that glucose lies above 100.",
            question="Sodium is {sodium} mmol/L and glucose {glucose} mg/dL. What is the sodium corrected for glucose?",
            values={"sodium": _span("118", "142", "1"), "glucose": _span("200", "900", "10")},
            work=lambda work, sodium, glucose: work(
                work(work(work(glucose, "-", 100), "/", 100), "x", "1.6"), "+", sodium
            ),
        ),
        Formula(
            kind="osmolality",
            name="calculated osmolality",
            unit="mOsm/kg",
            num_decimals=1,
            source="Smithline and Gardner, JAMA, 1976",
            rule="The calculated osmolality is twice the sodium plus glucose / 18 plus urea nitrogen / 2.8.",
            question="Sodium is {sodium} mmol/L, glucose {glucose} mg/dL and blood urea nitrogen "
            "{urea_nitrogen} mg/dL. What is the calculated serum osmolality?",
            values={
                "sodium": _span("125", "155", "1"),
                "glucose": _span("72", "720", "9"),
                "urea_nitrogen": _span("7", "98", "7"),
            },
            work=_osmolality,
        ),
        Formula(
            kind="body_mass_index",
            name="body mass index",
            unit="kg/m2",
            num_decimals=1,
            source="Keys et al., Journal of Chronic Diseases, 1972",
            rule="The body mass index is the weight divided by the square of the height.",
            question="A patient weighs {weight} kg and is {height} m tall. What is the body mass index?",
            values={"weight": _span("45", "130", "1"), "height": _span("1.48", "1.95", "0.01")},
            work=lambda work, weight, height: work(weight, "/", work(height, "x", height)),
        ),
        Formula(
            kind="creatinine_clearance",
            name="creatinine clearance",
            unit="mL/min",
            num_decimals=0,
            source="Cockcroft and Gault, Nephron, 1976",
            rule="By Cockcroft and Gault the clearance is (140 - age) times weight, times 0.85 in women, "
            "divided by 72 times the serum creatinine.",
            question="A {sex} patient is {age} years old, weighs {weight} kg and has a serum creatinine of "
            "{creatinine} mg/dL. What is the Cockcroft-Gault creatinine clearance?",
            values={
                "age": _span("20", "90", "1"),
                "weight": _span("42", "110", "1"),
                "creatinine": _span("0.6", "4", "0.1"),
                "sex": ("female", "male"),
            },
            work=_creatinine_clearance,
        ),
        Formula(
            kind="sodium_excretion",
            name="fractional excretion of sodium",
            unit="%",
            num_decimals=1,
            source="Espinel, JAMA, 1976",
            rule="The fractional excretion is urine sodium times plasma creatinine times 100, divided by plasma sodium "
            "times urine creatinine.",
            question="Urine sodium is {urine_sodium} and plasma sodium {plasma_sodium} mmol/L; urine creatinine is "
            "{urine_creatinine} and plasma creatinine {plasma_creatinine} mg/dL. "
            "What is the fractional excretion of sodium?",
            values={
                "urine_sodium": _span("5", "120", "1"),
                "plasma_sodium": _span("125", "150", "1"),
                "urine_creatinine": _span("20", "200", "5"),
                "plasma_creatinine": _span("1", "6", "0.1"),
            },
            work=_sodium_excretion,
        ),
        Formula(
            kind="winters_pco2",
            name="expected carbon dioxide pressure",
            unit="mmHg",
            num_decimals=1,
            source="Albert, Dell and Winters, Annals of Internal Medicine, 1967",
            rule="By Winters' formula the expected pressure is 1.5 times the bicarbonate plus 8.",
            question="A patient with metabolic acidosis has a bicarbonate of {bicarbonate} mmol/L. "
            "What arterial carbon dioxide pressure does Winters' formula expect?",
            values={"bicarbonate": _span("5", "22", "0.2")},
            work=lambda work, bicarbonate: work(work(bicarbonate, "x", "1.5"), "+", 8),
        ),
        Formula(
            kind="ldl_cholesterol",
            name="LDL cholesterol",
            unit="mg/dL",
            num_decimals=0,
            source="Friedewald et al., Clinical Chemistry, 1972",
            rule="By Friedewald the LDL cholesterol is total minus HDL cholesterol minus a fifth of the triglycerides.",
            question="Total cholesterol is {total}, HDL cholesterol {hdl} and triglycerides {triglycerides} mg/dL. "
            "What is the LDL cholesterol?",
            values={
                "total": _span("150", "320", "1"),
                "hdl": _span("25", "80", "1"),
                "triglycerides": _span("50", "395", "5"),
            },
            work=lambda work, total, hdl, triglycerides: work(
                work(total, "-", hdl), "-", work(triglycerides, "/", 5)
            ),
        ),
        Formula(
            kind="burn_fluids",
            name="fluid rate",
            unit="mL/h",
            num_decimals=0,
            source="Baxter and Shires, Annals of the New York Academy of Sciences, 1968",
            rule="By the Parkland formula the first day's fluid is 4 mL per kilogram and per percent burned, "
            "half of it in the first eight hours.",
            question="A patient of {weight} kg has burns of {burned} percent of the body surface. "
            "What is the fluid rate for the first eight hours by the Parkland formula?",
            values={"weight": _span("40", "110", "1"), "burned": _span("15", "60", "1")},
            work=lambda work, weight, burned: work(
                work(work(work(weight, "x", 4), "x", burned), "/", 2), "/", 8
            ),
        ),
    )
}

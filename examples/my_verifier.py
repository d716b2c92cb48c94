"""A verifier of your own: a function from rollouts to scores. From this folder, run

    verippo ppo --verifier.kind function --verifier.function my_verifier:score ...

Scores may be any finite numbers; the metrics count a response as right when its score is at least
verifier.right (1.0). This verifier is for numeric answers, such as doses or clinical scores, and
tolerates rounding.
"""

import re

RELATIVE_TOLERANCE = 0.05
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


def score(rollouts):
    """1.0 for a number within the tolerance, 0.1 for another number, 0.0 without a number.

    Args:
        rollouts: each has .text (the response), .final (its final part; None when the format is
            broken), .truncated, and .problem with .question and .answer (the reference answer).
    """
    return [score_one(rollout.final, rollout.problem.answer) for rollout in rollouts]


def score_one(final, reference):
    """Scores one answer by its last number, which is its conclusion."""
    numbers = NUMBER.findall(final or "")
    if not numbers:
        return 0.0
    value = float(numbers[-1])
    wanted = float(NUMBER.findall(reference)[-1])
    return 1.0 if abs(value - wanted) <= RELATIVE_TOLERANCE * abs(wanted) else 0.1

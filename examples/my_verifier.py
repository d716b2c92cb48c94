"""A verifier of your own: a function from rollouts to scores. From this folder,

    verippo ppo --verifier.kind function --verifier.function my_verifier:score ...

It may return any finite numbers; metrics count a response as right when its score is at least verifier.right (1.0).
This one is for answers that are numbers, such as doses or clinical scores: it forgives rounding.
"""

import re

TOLERANCE = 0.05  # relative
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


def score(rollouts):
    """1.0 for a number within the tolerance of the reference answer, 0.1 for another, 0.0 without one.

    A rollout has .final (the final response; None when the format is broken), .text (all of the response), .truncated,
    and .problem with .question and .answer (the reference).
    """
    return [score_one(rollout.final, rollout.problem.answer) for rollout in rollouts]


def score_one(final, reference):
    said = NUMBER.findall(final or "")
    if not said:
        return 0.0
    value, wanted = (
        float(said[-1]),
        float(NUMBER.findall(reference)[-1]),
    )  # the last number is the conclusion
    return 1.0 if abs(value - wanted) <= TOLERANCE * abs(wanted) else 0.1

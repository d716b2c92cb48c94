"""Finds the stage that `verippo plan` is asked about."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .option_check import read_config_files

STAGES = ("ppo", "sft", "verifier")
VERIFIER_KEYS = {"threshold", "template", "wrong_per_question", "llm"}
"""Options of the verifier's training that stage 1 lacks."""


def name_stage(arguments: Sequence[str]) -> list[str]:
    """Adds the stage to the arguments of `verippo plan` where it is not given.

    Args:
        arguments: those of the command, after `plan`.

    Returns:
        The same, beginning with ppo, sft or verifier.

    Raises:
        ValueError: there is no configuration file to find the stage from.
    """
    if arguments and (arguments[0] in STAGES or arguments[0] in ("-h", "--help")):
        return list(arguments)
    files = read_config_files(arguments)
    options = {argument.lstrip("-").partition("=")[0] for argument in arguments}
    keys = options.union(*files)
    if not keys & {"policy", "model"}:
        raise ValueError(
            f"which stage? say verippo plan {' | '.join(STAGES)}, or give --config with a policy "
            "or a model"
        )
    return [stage_of(keys), *arguments]


def stage_of(keys: Iterable[str]) -> str:
    """The stage that a configuration with these options belongs to."""
    names = set(keys)
    if "policy" in names:
        return "ppo"
    return "verifier" if VERIFIER_KEYS & names else "sft"

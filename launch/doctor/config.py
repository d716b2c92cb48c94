"""Configuration of `verippo doctor`: the options of a stage, and a few of its own."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.bounds import CountingInt, PositiveFloat
from ...rl.config import PPOConfig
from ...sft.config import SFTConfig, VerifierTrainingConfig


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Options of the checks."""

    dry_run: bool = False
    """Also run two steps with small random models on CPU, and resume after the first."""
    ranks: CountingInt | None = None
    """Number of ranks that the run will have; null: those of this command."""
    connect_seconds: PositiveFloat = 5.0
    """Time limit of a connection to a server, in seconds."""


@dataclass(frozen=True, kw_only=True)
class PPODoctorConfig(PPOConfig, DoctorOptions):
    """Checks a PPO run before it starts: machine, servers, ranks, disk, models, data, batches.

    The options are those of `verippo ppo`, and the following. Started by deepspeed, torchrun or
    srun, it compares the ranks too. The exit status is 2 when a check failed.
    """


@dataclass(frozen=True, kw_only=True)
class SFTDoctorConfig(SFTConfig, DoctorOptions):
    """Checks a run of stage 1 before it starts, as `doctor ppo` does.

    The options are those of `verippo sft`, and the following.
    """


@dataclass(frozen=True, kw_only=True)
class VerifierDoctorConfig(VerifierTrainingConfig, DoctorOptions):
    """Checks the verifier's training before it starts, as `doctor ppo` does.

    The options are those of `verippo verifier`, and the following.
    """


DoctorConfig = PPODoctorConfig | SFTDoctorConfig | VerifierDoctorConfig

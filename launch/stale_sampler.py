"""A sampler with old weights on purpose, for the ablation of corrections."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ..core.sampling.local_sampler import LocalSampler
from ..core.training.pretrained import load_causal_lm

PERIOD = 4
"""Steps from one update of the weights to the next."""


class StaleSampler(LocalSampler):
    """Takes every fourth update only, but claims to hold the newest weights."""

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        if version % PERIOD == 0:
            super().update_weights(named_tensors, version)
        else:
            for _ in named_tensors:  # gathered by all ranks together
                pass
            self.version = version


def every_fourth_step(model_path: str, stop_token_ids: Sequence[int]) -> StaleSampler:
    """Creates the sampler, in fp32 on CPU."""
    model: Any = load_causal_lm(model_path, dtype="fp32")
    return StaleSampler(model, stop_token_ids=stop_token_ids)

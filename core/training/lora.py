"""Low-rank adapters on frozen models (LoRA, arXiv 2106.09685), by the library peft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from ..bounds import NonNegativeInt, PositiveFloat, check_bounds
from .engine import FrozenEngine, TrainEngine
from .merging import ADAPTER, adapted_layers, leave_out_frozen

ModuleT = TypeVar("ModuleT", bound=nn.Module)
ALL_LINEAR = "all-linear"
HEAD = "score"
"""Name of the head of a critic or classifier, which is trained beside the adapters."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters, trained in place of a model's weights (LoRA, arXiv 2106.09685)."""

    rank: NonNegativeInt = 0
    """Rank of the adapters; 0 trains the weights themselves."""
    alpha: PositiveFloat = 32.0
    """Scale of the adapters: a weight W becomes W + alpha/rank B A."""
    targets: str = ALL_LINEAR
    """Linear layers that have adapters: all-linear (all of the decoder), or their names, such as
    q_proj,v_proj."""

    def __post_init__(self) -> None:
        check_bounds(self, prefix="lora.")


def with_adapters(module: ModuleT, config: LoraConfig, *, seed: int) -> ModuleT:
    """Freezes a model and gives its linear layers adapters, which change nothing at first.

    The head of a critic stays trained.

    Args:
        module: a module whose `hf` attribute is the Hugging Face model. It may be sharded.
        config: rank 0 returns the module as it is.
        seed: seed of the adapters' first factors.

    Returns:
        The same module.

    Raises:
        ValueError: the model has no layer of a name in `lora.targets`.
    """
    if not config.rank:
        return module
    import peft

    hf: Any = module.hf
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        target_modules=target_names(hf, config.targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, hf, adapter_name=ADAPTER)
    if (head := getattr(hf, HEAD, None)) is not None:
        head.requires_grad_(True)
    hf.register_state_dict_post_hook(leave_out_frozen)
    return module


def target_names(hf: Any, targets: str) -> list[str]:
    """Names of the decoder's linear layers that have adapters.

    Args:
        hf: the Hugging Face model.
        targets: as `LoraConfig.targets`.

    Raises:
        ValueError: there is no layer of a name.
    """
    decoder = {id(part) for part in hf.base_model.modules()}
    linear = [
        name
        for name, part in hf.named_modules()
        if isinstance(part, nn.Linear) and id(part) in decoder
    ]
    if targets == ALL_LINEAR:
        return linear
    wanted = [target.strip() for target in targets.split(",")]
    found = {name for name in linear if name.rpartition(".")[2] in wanted}
    known = sorted({name.rpartition(".")[2] for name in linear})
    if unknown := sorted(set(wanted) - set(known)):
        raise ValueError(
            f"lora.targets={targets}: the model has no linear layers called {', '.join(unknown)}: "
            f"choose {ALL_LINEAR} or some of {','.join(known)}"
        )
    return sorted(found)


class FrozenBase(FrozenEngine):
    """The weights under a trained model's adapters, as a frozen model that takes no memory."""

    def __init__(self, adapted: TrainEngine) -> None:
        self.module: Any = adapted.module
        self.engine: Any = adapted.engine

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layers = adapted_layers(self.module.hf).values()
        self.engine.eval()
        for layer in layers:
            layer.enable_adapters(False)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            for layer in layers:
                layer.enable_adapters(True)
            self.engine.train()

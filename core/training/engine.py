"""The only deepspeed import: a module, its optimizer and its shards behind a few verbs."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from . import dist

Offload = Literal["none", "optimizer", "all"]
Dtype = Literal["bf16", "fp32"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    zero_stage: Literal[0, 1, 2, 3] = 3
    """what is sharded over ranks: 1 optimizer states, 2 gradients too, 3 parameters too"""
    offload: Offload = "none"
    """what lives in host memory: nothing, optimizer states, or parameters too (needs stage 3)"""
    dtype: Dtype = "bf16"
    """of weights and activations; master weights and optimizer states are always fp32"""
    gradient_checkpointing: bool = True
    """recompute each layer in the backward pass instead of storing its activations"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this global norm"""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """decay rates of Adam's two moments (arXiv 1711.05101)"""
    adam_epsilon: float = 1e-8
    """added to the root of the second moment"""
    weight_decay: float = 0.0
    """decoupled, on matrices only: never on norms and biases"""

    def __post_init__(self) -> None:
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError(f"offload=all needs zero_stage=3, got zero_stage={self.zero_stage}")
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload=optimizer needs zero_stage 1, 2 or 3, got 0")
        if self.max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm}: must be above 0")


class StepResult(NamedTuple):
    applied: bool
    """false when the gradient was not finite: then nothing moved, on any rank"""
    grad_norm: float
    """global norm before clipping; NaN when not applied"""


def _deepspeed() -> Any:
    """deepspeed, imported once a group exists. On CPU its shared-memory extension (a minute of compiling, used only by
    inference) is switched off."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault(
        "DEEPSPEED_LOG_LEVEL", "error"
    )  # its warnings: untested optimizer, skipped step (we count those)
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="torch.distributed"
    )  # collectives it calls by old names
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    if not deepspeed.comm.is_initialized():
        dist.init()
        deepspeed.init_distributed(verbose=False)
    return deepspeed


def deepspeed_config(config: EngineConfig, *, world_size: int, train: bool) -> dict[str, Any]:
    """The DeepSpeed configuration of one engine. It accumulates nothing by itself: the caller marks the last micro-batch."""
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = False
    if train and config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.dtype == "bf16"},
        "gradient_clipping": config.max_grad_norm,
        "steps_per_print": None,
    }


class TrainEngine:
    """A trained module: forward, backward with sums over global token counts, step, weights, state."""

    def __init__(
        self,
        module: nn.Module,
        config: EngineConfig,
        *,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """optimizer: in place of AdamW, for tests that compare single steps."""
        deepspeed = _deepspeed()
        self.config = config
        if config.gradient_checkpointing:
            hf: Any = module.hf
            hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.dtype == "fp32":
            module = module.float()
        settings = deepspeed_config(config, world_size=dist.world_size(), train=True)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer or _adamw(module, config),
            config=settings,
            dist_init_required=False,
        )
        self.engine.train()

    @property
    def module(self) -> Any:
        return self.engine.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def backward(self, loss_sum: Tensor, num_tokens: int, *, last: bool) -> None:
        """Adds the gradient of loss_sum / num_tokens, where the sum runs over this micro-batch and the count over the whole
        mini-batch of all ranks. DeepSpeed averages gradients over ranks, hence the factor. `last` marks the mini-batch's
        last micro-batch; every rank makes the same number of calls."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss_sum * (dist.world_size() / num_tokens), scale_wrt_gas=False)

    def step(self, learning_rate: float) -> StepResult:
        """One optimizer step over what was accumulated; skipped on every rank when the gradient's norm is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if (
            self.config.zero_stage == 0 and self.config.dtype == "fp32"
        ):  # DeepSpeed neither reports nor checks it there
            norm = nn.utils.get_total_norm(
                [p.grad for p in self.module.parameters() if p.grad is not None]
            ).item()
            if not math.isfinite(norm):
                self.engine.zero_grad()
                return StepResult(False, math.nan)
            self.engine.step()
            return StepResult(True, norm)
        self.engine.step()
        applied = self.engine.was_step_applied()
        return StepResult(
            applied, float(self.engine.get_global_grad_norm()) if applied else math.nan
        )

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every Hugging Face weight in full, one at a time; tied ones once. Every rank must iterate to the end."""
        deepspeed = _deepspeed()
        for name, parameter in self.module.hf.named_parameters():
            sharded = hasattr(parameter, "ds_id")
            with deepspeed.zero.GatheredParameters([parameter]) if sharded else nullcontext():
                yield name, parameter.detach()

    def full_state(self) -> dict[str, Tensor]:
        """All weights on rank 0's host memory, for export; empty on the other ranks."""
        state = {}
        for name, tensor in self.named_tensors():
            if dist.is_main():
                state[name] = tensor.cpu().clone()
        return state

    def save(self, folder: Path, name: str) -> None:
        """Writes weights, master weights, optimizer states and counters of this rank's shard under folder/name."""
        self.engine.save_checkpoint(str(folder), tag=name, save_latest=False)

    def load(self, folder: Path, name: str) -> None:
        """Takes up what `save` wrote. Raises ValueError when it cannot, for example after a change of rank count."""
        try:
            path, _ = self.engine.load_checkpoint(str(folder), tag=name)
        except Exception as error:
            reason = (
                " ".join(str(error).split())[:300]
                or f"not there, or not whole ({type(error).__name__})"
            )
            raise ValueError(f"checkpoint {folder / name}: {reason}") from None
        if path is None:
            raise ValueError(f"checkpoint {folder / name}: not found")


class FrozenEngine:
    """A module that is only asked: the reference policy, or a verifier. Sharded under ZeRO-3, whole otherwise."""

    def __init__(self, module: nn.Module, config: EngineConfig) -> None:
        module.requires_grad_(False).eval()
        if config.zero_stage < 3 or dist.world_size() == 1:
            self.engine: Any = module.to(dist.device())
            return
        settings = deepspeed_config(config, world_size=dist.world_size(), train=False)
        self.engine = _deepspeed().initialize(
            model=module, config=settings, dist_init_required=False
        )[0]
        self.engine.eval()

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; norms and biases (fewer than two dimensions) without."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in parameters if _num_dimensions(p) >= 2],
            "weight_decay": weight_decay,
        },
        {"params": [p for p in parameters if _num_dimensions(p) < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _num_dimensions(parameter: nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _adamw(module: nn.Module, config: EngineConfig) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": 0.0, "betas": config.adam_betas, "eps": config.adam_epsilon}
    groups = parameter_groups(module, config.weight_decay)
    if config.offload != "none":  # DeepSpeed's own Adam runs on host memory
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, **options, adamw_mode=True)
    return torch.optim.AdamW(groups, **options, fused=torch.cuda.is_available())

"""DeepSpeed engines: training and frozen models, sharded by ZeRO. The only deepspeed import."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from . import dist
from .merging import adapted_layers, check_base_digest, stored_weights, write_base_digest
from .resharding import Layout, load_resharded
from .shard_files import MAX_FILE_BYTES, read_weights, write_weights

Offload = Literal["none", "optimizer", "all"]
Dtype = Literal["bf16", "fp32"]
BUCKET_ELEMENTS = 50_000_000
"""Elements that DeepSpeed reduces, gathers or updates at once: the size of its buffers."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of a DeepSpeed engine."""

    zero_stage: Literal[0, 1, 2, 3] = 3
    """ZeRO stage: 1 shards optimizer states, 2 gradients too, 3 parameters too."""
    offload: Offload = "none"
    """States in host memory: none, optimizer, or all (parameters too, which needs stage 3)."""
    dtype: Dtype = "bf16"
    """Data type of weights and activations; master weights and optimizer states are fp32."""
    gradient_checkpointing: bool = True
    """Recompute each layer in the backward pass instead of storing its activations."""
    max_grad_norm: float = 1.0
    """Global norm to which gradients are clipped."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's two moments (arXiv 1711.05101)."""
    adam_epsilon: float = 1e-8
    """Term added to the root of Adam's second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; never applied to norms and biases."""

    def __post_init__(self) -> None:
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError(f"offload=all needs zero_stage=3, got zero_stage={self.zero_stage}")
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload=optimizer needs zero_stage 1, 2 or 3, got 0")
        if self.max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm}: must be above 0")


class StepResult(NamedTuple):
    """Outcome of an optimizer step."""

    applied: bool
    """False when the gradient was not finite; no rank has then changed a weight."""
    grad_norm: float
    """Global norm before clipping; NaN when the step was not applied."""


def _deepspeed() -> Any:
    """Imports deepspeed, once a process group exists.

    On CPU its shared-memory extension is switched off: it takes a minute to compile and serves
    inference alone.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # hides warnings of untested optimizers, of skipped steps (counted by us) and of old names
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    if not deepspeed.comm.is_initialized():
        dist.init()
        deepspeed.init_distributed(verbose=False)
    return deepspeed


def deepspeed_config(config: EngineConfig, *, world_size: int, train: bool) -> dict[str, Any]:
    """DeepSpeed's configuration of one engine.

    Gradient accumulation is left to the caller, who marks the last micro-batch.
    """
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
    }
    if config.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = False
        zero["sub_group_size"] = BUCKET_ELEMENTS
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


def weights_are_sharded(config: EngineConfig) -> bool:
    """Whether an engine shards the weights themselves: under ZeRO-3, if there are several ranks."""
    return config.zero_stage == 3 and dist.world_size() > 1


def shard_parameters(
    module: nn.Module, config: EngineConfig, read: Callable[[nn.Parameter], Tensor]
) -> None:
    """Shards a module's parameters for its engine, with one whole parameter in memory at a time.

    Args:
        module: the module. Its parameters need have no values.
        config: settings of the engine.
        read: the value of a parameter, on any device; rank 0 sends it to the others.
    """
    deepspeed = _deepspeed()
    device = dist.device()
    largest = max(module.parameters(), key=torch.numel)
    # one buffer for all: freed ones of many sizes would stay with the process
    buffer = torch.empty(largest.numel(), dtype=largest.dtype, device=device)

    def filled() -> Iterator[nn.Parameter]:
        for parameter in module.parameters():
            value = read(parameter)
            parameter.data = buffer[: value.numel()].view(value.shape)
            if dist.is_main():
                parameter.data.copy_(value)
            yield parameter

    parameters = filled()
    first: Any = next(parameters)
    settings = deepspeed_config(config, world_size=dist.world_size(), train=False)
    deepspeed.zero.Init(module=nn.ParameterList([first]), config_dict_or_path=settings)
    first.convert_to_zero_parameters(parameters)
    module.to(device)  # the buffers


class TrainEngine:
    """A model being trained, with its optimizer."""

    def __init__(
        self,
        module: nn.Module,
        config: EngineConfig,
        *,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Args:
        module: a module whose `hf` attribute is the Hugging Face model.
        config: engine settings.
        optimizer: replaces AdamW, for tests that compare single steps.
        """
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
        self.adapted = bool(adapted_layers(self.module.hf))

    @property
    def module(self) -> Any:
        return self.engine.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def backward(
        self,
        loss_sum: Tensor,
        num_tokens: int,
        *,
        last: bool,
    ) -> None:
        """Adds the gradient of loss_sum / num_tokens.

        Every rank must make the same number of calls. DeepSpeed averages gradients over ranks,
        hence the factor of the world size.

        Args:
            loss_sum: loss summed over this micro-batch.
            num_tokens: tokens of the whole mini-batch, over all ranks.
            last: whether this is the last micro-batch of the mini-batch.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss_sum * (dist.world_size() / num_tokens), scale_wrt_gas=False)

    def step(self, learning_rate: float) -> StepResult:
        """Takes an optimizer step, skipped on every rank if the gradient norm is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        # DeepSpeed neither reports nor checks the norm in this case
        if self.config.zero_stage == 0 and self.config.dtype == "fp32":
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients).item()
            if not math.isfinite(norm):
                self.engine.zero_grad()
                return StepResult(False, math.nan)
            self.engine.step()
            return StepResult(True, norm)
        self.engine.step()
        if not self.engine.was_step_applied():
            return StepResult(False, math.nan)
        return StepResult(True, float(self.engine.get_global_grad_norm()))

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every Hugging Face weight in full; see `named_tensors`."""
        return named_tensors(self.module)

    def full_state(self) -> dict[str, Tensor]:
        """All weights in the host memory of rank 0, for export; empty on the other ranks."""
        return full_state(self.module)

    def save(self, folder: Path, name: str) -> None:
        """Writes this rank's weights, optimizer states and counters under folder/name.

        Of a model with adapters, it writes what is trained and a digest of the other weights.
        """
        self.engine.save_checkpoint(
            str(folder), tag=name, save_latest=False, exclude_frozen_parameters=self.adapted
        )
        if self.adapted:
            write_base_digest(folder / name, self.module.hf, _gathered, write=dist.is_main())

    def load(self, folder: Path, name: str) -> None:
        """Loads what `save` wrote.

        It may have been saved by another number of ranks, or under another ZeRO stage of 1 to 3.

        Raises:
            ValueError: it is missing or damaged, or one of the two stages is 0; or its adapters
                belong to other weights.
        """
        if self.adapted and (folder / name).is_dir():
            check_base_digest(folder / name, self.module.hf, _gathered)
        own = Layout.of_engine(self.config.zero_stage)
        if (found := Layout.of_checkpoint(folder / name)) != own and (folder / name).is_dir():
            from deepspeed.checkpoint import ds_to_universal

            load_resharded(self.engine, folder / name, found, own, convert=ds_to_universal.main)
            return
        try:
            path, _ = self.engine.load_checkpoint(
                str(folder), tag=name, load_module_strict=not self.adapted
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or f"incomplete ({type(error).__name__})"
            raise ValueError(f"checkpoint {folder / name}: {reason}") from None
        if path is None:
            raise ValueError(f"checkpoint {folder / name}: not found")
        # the checkpoint brings the weight decay of its run along; the first group is the matrices'
        self.optimizer.param_groups[0]["weight_decay"] = self.config.weight_decay


class FrozenEngine:
    """A model that no optimizer trains: the reference or a verifier. Sharded under ZeRO-3."""

    def __init__(self, module: nn.Module, config: EngineConfig) -> None:
        self.module: Any = module.requires_grad_(False).eval()
        if not weights_are_sharded(config):
            self.engine: Any = module.to(dist.device())
            return
        settings = deepspeed_config(config, world_size=dist.world_size(), train=False)
        deepspeed = _deepspeed()
        options = {"model": module, "config": settings, "dist_init_required": False}
        self.engine = deepspeed.initialize(**options)[0]
        self.engine.eval()

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every Hugging Face weight in full; see `named_tensors`."""
        return named_tensors(self.module)

    @torch.no_grad()
    def copy_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces the weights by others of the same shapes, such as those of a `TrainEngine`.

        Every rank must call it and iterate all tensors; under ZeRO-3 rank 0's values count.

        Args:
            tensors: Hugging Face names with full tensors, in the order of `named_tensors`.
        """
        parameters = self.module.hf.named_parameters()
        for (name, parameter), (other, tensor) in zip(parameters, tensors, strict=True):
            assert name == other, f"weights {name} and {other}"
            with _gathered(parameter, modifier_rank=0):
                if dist.is_main() or not hasattr(parameter, "ds_id"):
                    parameter.copy_(tensor)

    def save(self, folder: Path, name: str) -> None:
        """Writes the weights to folder/name. Every rank must call it."""
        weights = named_tensors(self.module)
        if dist.is_main():
            (folder / name).mkdir()
            write_weights(folder / name, weights, MAX_FILE_BYTES)
        for _ in weights:  # gathered by all ranks together
            pass

    def load(self, folder: Path, name: str) -> None:
        """Loads what `save` wrote."""
        names = [key for key, _ in self.module.hf.named_parameters()]
        self.copy_weights(read_weights(folder / name, names))


def named_tensors(module: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields every Hugging Face weight in full, one at a time; tied weights once.

    Adapters are merged into the weights they belong to. Every rank must iterate to the end.

    Args:
        module: a module whose `hf` attribute is the Hugging Face model.
    """
    for weight in stored_weights(module.hf):
        with _gathered(*weight.parts):
            yield weight.name, weight.value()


def full_state(module: Any) -> dict[str, Tensor]:
    """All weights in the host memory of rank 0; empty on the other ranks."""
    state = {}
    for name, tensor in named_tensors(module):
        if dist.is_main():
            state[name] = tensor.cpu().clone()
    return state


def weight_shapes(module: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the Hugging Face weights in full, by name."""
    return {weight.name: weight.shape for weight in stored_weights(module.hf)}


def _gathered(*parameters: nn.Parameter, modifier_rank: int | None = None) -> Any:
    """Context in which parameters are whole; changes by `modifier_rank` are kept on every rank."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        return nullcontext()
    return _deepspeed().zero.GatheredParameters(sharded, modifier_rank=modifier_rank)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices with weight decay; norms and biases without."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in parameters if _num_dimensions(p) >= 2]
    vectors = [p for p in parameters if _num_dimensions(p) < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _num_dimensions(parameter: nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _adamw(module: nn.Module, config: EngineConfig) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": 0.0, "betas": config.adam_betas, "eps": config.adam_epsilon}
    groups = parameter_groups(module, config.weight_decay)
    if config.offload != "none":  # DeepSpeed's own Adam works in host memory
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, **options, adamw_mode=True)
    return torch.optim.AdamW(groups, **options, fused=True)

"""What the tests of adapters do on every rank. Called in the tests' own process for one rank; run
by torchrun for two:

    python -m torch.distributed.run --nproc_per_node 2 tests/core/training/lora_ranks.py FOLDER

reads FOLDER/job.pt (a Job's fields), writes FOLDER/rank-N.pt (what `run` returns). Nothing is
compared here: the tests do that.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from verippo.core.training import dist
from verippo.core.training import engine as core_engine
from verippo.core.training.engine import EngineConfig, TrainEngine, deepspeed_config
from verippo.core.training.export import save_model
from verippo.core.training.lora import FrozenBase, LoraConfig, with_adapters
from verippo.core.training.packing import PackedBatch
from verippo.core.training.pretrained import load_critic, load_policy, load_tokenizer
from verippo.rl.experience import Experience, MiniBatch, compute

RATE = 0.05
RANK = 4
ALPHA = 8.0
RESUMED = [("policy", 0), ("critic", 1), ("critic", 2), ("policy", 3), ("critic", 3)]
"""Models and ZeRO stages whose checkpoints are loaded."""


@dataclass(frozen=True, kw_only=True)
class Job:
    folder: Path
    policy: str
    critic: str
    experience: Experience
    """Its returns are the critic's targets."""
    factors: dict[str, dict[str, torch.Tensor]]
    """Of "policy" and "critic": adapters' weights by name."""


def settings(stage: int, **changes: Any) -> EngineConfig:
    known = {
        "zero_stage": stage,
        "dtype": "fp32",
        "gradient_checkpointing": False,
        "max_grad_norm": 1e9,
    }
    return EngineConfig(**known | changes)


def adapted(job: Job, name: str, config: EngineConfig, *, seed: int = 0, given: bool = True) -> Any:
    """The policy or the critic with adapters: with the job's weights, or as they start."""
    load: Any = {"policy": load_policy, "critic": load_critic}[name]
    module = load(getattr(job, name), dtype=config.dtype, engine=config)
    module = with_adapters(module, LoraConfig(rank=RANK, alpha=ALPHA), seed=seed)
    if given:
        found = dict(module.hf.named_parameters())
        with torch.no_grad():
            for key, value in job.factors[name].items():
                found[key].copy_(value)
    return module


def sgd(module: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=RATE)


def step(engine: TrainEngine, name: str, experience: Experience, rate: float) -> None:
    """One step: on minus the mean log-prob, or on half the mean squared error."""
    mini = MiniBatch(experience=experience, seqs=list(range(experience.batch.num_seqs)))
    for micro in mini.microbatches(20):
        output = engine(micro.batch)
        if name == "policy":
            loss = -output.sum()
        else:
            error = torch.where(micro.mask, output - micro.returns, 0.0)
            loss = 0.5 * error.square().sum()
        engine.backward(loss, mini.num_response_tokens, last=micro.last)
    engine.step(rate)


def logprobs(forward: Any, batch: PackedBatch) -> torch.Tensor:
    return compute(forward, batch, max(batch.lengths))[0]


def updated(job: Job, name: str, stage: int, **changes: Any) -> dict[str, Any]:
    """Weights and outputs before and after a step with plain SGD, and the exported folder."""
    config = settings(stage, **changes)
    module = adapted(job, name, config)
    engine = TrainEngine(module, config, optimizer=sgd(module))
    base = FrozenBase(engine)
    batch = job.experience.batch
    result = {
        "before": engine.full_state(),
        "outputs_before": logprobs(engine, batch),
        "base_before": logprobs(base, batch),
        "training": engine.module.training,
    }
    step(engine, name, job.experience, RATE)
    folder = job.folder / f"{name}-{dist.world_size()}-{stage}"
    path = getattr(job, name)
    save_model(folder, engine.module.hf, engine.named_tensors(), load_tokenizer(path))
    dist.barrier()
    return result | {
        "after": engine.full_state(),
        "outputs": logprobs(engine, batch),
        "base": logprobs(base, batch),
        "folder": str(folder),
        "held": sum(p.numel() for p in engine.module.parameters()),
    }


def resumed(job: Job, name: str, stage: int, **changes: Any) -> dict[str, Any]:
    """Weights after two steps of AdamW, and after loading the first in a fresh engine."""
    config = settings(stage, **changes)
    first, second = (
        TrainEngine(adapted(job, name, config, seed=seed, given=False), config) for seed in (0, 1)
    )
    folder = job.folder / f"checkpoint-{dist.world_size()}-{stage}-{config.dtype}"
    step(first, name, job.experience, 1e-2)
    saved = first.full_state()
    first.save(folder, name)
    dist.barrier()
    step(first, name, job.experience, 1e-2)
    result = {"saved": saved, "unbroken": first.full_state(), "fresh": second.full_state()}
    second.load(folder, name)
    result["loaded"] = second.full_state()
    step(second, name, job.experience, 1e-2)
    files = [path for path in (folder / name).rglob("*") if path.is_file()]
    return result | {
        "resumed": second.full_state(),
        "bytes": sum(path.stat().st_size for path in files),
        "folder": str(folder),
    }


def sharded_throughout(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """As core.engine's, but ZeRO-3 shards small parameters too, which it would leave whole."""
    config = deepspeed_config(*args, **kwargs)
    if config["zero_optimization"]["stage"] == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


@mock.patch.object(core_engine, "deepspeed_config", sharded_throughout)
def run(job: Job) -> dict[str, Any]:
    return {
        "updated": {
            (name, stage): updated(job, name, stage)
            for name in ("policy", "critic")
            for stage in (0, 3)
        },
        "checkpointing": {
            3: updated(job, "policy", 3, gradient_checkpointing=True),
        },
        "resumed": {(name, stage): resumed(job, name, stage) for name, stage in RESUMED},
    }


if __name__ == "__main__":
    target = Path(sys.argv[1])
    dist.init(timeout_seconds=60)
    results = run(Job(**torch.load(target / "job.pt", weights_only=False)))
    torch.save(results, target / f"rank-{dist.rank()}.pt")

"""Trains a little model in stretches, each on its own number of ranks and ZeRO stage.

    python -m torch.distributed.run --nproc_per_node N tests/core/training/resharding_checks.py \
        MODEL FOLDER STRETCH...

A stretch is NAME:STAGE:FROM:STEPS: it starts from the checkpoint of stretch FROM, or from the
model if that is empty, takes so many steps, and writes its checkpoint and its weights to
FOLDER/NAME. The same batches in the same order, divided over the ranks.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from verippo.core.training import dist, engine
from verippo.core.training.engine import EngineConfig, TrainEngine
from verippo.core.training.packing import PackedBatch, pack
from verippo.core.training.pretrained import load_policy

NUM_ROWS = 4
RESPONSE = 9
engine.BUCKET_ELEMENTS = 2_000  # less than the largest weight, so that there are several buckets


def own_batch(step: int) -> PackedBatch:
    """This rank's rows of a step."""
    generator = torch.Generator().manual_seed(step)

    def draw(length: int) -> list[int]:
        return torch.randint(3, 300, (length,), generator=generator).tolist()

    rows = [
        SimpleNamespace(prompt_ids=draw(4), response_ids=draw(RESPONSE)) for _ in range(NUM_ROWS)
    ]
    return pack(rows[dist.rank() :: dist.world_size()])


def run(model: str, folder: Path, stretch: str) -> None:
    name, stage, source, steps = stretch.split(":")
    config = EngineConfig(
        zero_stage=int(stage),  # type: ignore[arg-type]
        dtype="fp32",
        weight_decay=0.1,  # of matrices alone: a loader that mixes groups up would show
        adam_epsilon=1e-5,
        gradient_checkpointing=False,
    )
    trained = TrainEngine(load_policy(model, dtype="fp32", engine=config), config)
    start = 0
    if source:
        trained.load(folder / source, "policy")
        start = int((folder / source / "steps").read_text())
    end = start + int(steps)
    for step in range(start, end):
        trained.backward(-trained(own_batch(step)).sum(), NUM_ROWS * RESPONSE, last=True)
        assert trained.step(1e-2).applied
    trained.save(folder / name, "policy")
    weights = trained.full_state()
    if dist.is_main():
        (folder / name / "steps").write_text(str(end))
        torch.save(weights, folder / name / "weights.pt")
    dist.barrier()


if __name__ == "__main__":
    dist.init(timeout_seconds=300)
    for text in sys.argv[3:]:
        run(sys.argv[1], Path(sys.argv[2]), text)

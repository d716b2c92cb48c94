"""Peak memory of each rank while a model is loaded, held by an engine and exported.

    python tests/core/training/memory_checks.py make MODEL --hidden 2048 --layers 20 --files 6
    MALLOC_MMAP_THRESHOLD_=65536 python -m torch.distributed.run --nproc_per_node 2 \
        tests/core/training/memory_checks.py measure MODEL --dtype bf16 --train true

`make` writes a random Llama. glibc's threshold is fixed so that it returns freed tensors to the
system, as a GPU's allocator reuses them. `measure` prints a JSON line for each rank; sizes are in MB of
anonymous memory (RssAnon and RssShmem of /proc/self/status), which leaves the pages of mapped files
out: the kernel drops those when memory is short, and ranks share them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from verippo.core.sampling.weight_sync import DiskSync
from verippo.core.training import dist, export
from verippo.core.training.engine import EngineConfig, TrainEngine, _deepspeed
from verippo.core.training.packing import pack
from verippo.core.training.pretrained import load_policy


def make(
    folder: Path,
    *,
    hidden: int,
    layers: int,
    files: int,
    dtype: torch.dtype,
    vocabulary: int = 32000,
) -> None:
    """Writes a random Llama in about so many files."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=512,
        dtype=dtype,
    )
    torch.set_default_dtype(dtype)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    size = sum(p.nbytes for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=int(size / (files - 0.5)))


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return 1024 * sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))


class Peak:
    """The largest amount of anonymous memory inside `measured` blocks, sampled every 2 ms."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}

    @contextlib.contextmanager
    def measured(self, name: str) -> Iterator[None]:
        done = threading.Event()
        self.peaks[name] = anonymous()

        def sample() -> None:
            while not done.wait(0.002):
                self.peaks[name] = max(self.peaks[name], anonymous())

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        start = time.perf_counter()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.peaks[name] = max(self.peaks[name], anonymous())
            self.peaks[f"{name}_seconds"] = round(time.perf_counter() - start, 1)


def measure(model: str, *, dtype: str, train: bool) -> dict[str, Any]:
    """Peaks of this rank: bytes above the baseline, by phase."""
    _deepspeed()
    small = Path(dist.broadcast(tempfile.mkdtemp()))
    if dist.is_main():
        make(small, hidden=64, layers=2, files=2, dtype=torch.float32)
    dist.barrier()
    engine = EngineConfig(zero_stage=3, dtype=dtype, gradient_checkpointing=False)  # type: ignore[arg-type]
    load_policy(str(small), dtype=dtype, engine=engine)  # what loading imports is no weight
    baseline = anonymous()
    peak = Peak()
    with peak.measured("load"):
        policy = load_policy(model, dtype=dtype, engine=engine)
    result = {"rank": dist.rank(), "dtype": dtype, "baseline": baseline, "held": anonymous()}
    if train:
        with peak.measured("engine"):
            held = TrainEngine(policy, engine)
        with peak.measured("step"):
            row: Any = SimpleNamespace(prompt_ids=[3] * 8, response_ids=[4] * 8)
            held.backward(-held(pack([row])).sum(), 8 * dist.world_size(), last=True)
            held.step(1e-3)
        result["held_engine"] = anonymous()
        # as `DiskSync` and `save_model` do, in files of about the size of the model's own
        export.MAX_FILE_BYTES = largest_file(model)
        target = Path(dist.broadcast(tempfile.mkdtemp(dir=Path(model).parent)))
        tokenizer: Any = SimpleNamespace(save_pretrained=lambda folder: None)
        with peak.measured("export"):
            export.save_model(target / "model", held.module.hf, held.named_tensors(), tokenizer)
        fleet: Any = SimpleNamespace(ask=lambda request: None)
        with peak.measured("sync"):
            tensors = held.named_tensors()
            if dist.is_main():
                DiskSync(target / "sync", largest_file(model), 1.0).push(fleet, tensors, "1")
            for _ in tensors:
                pass
        if dist.is_main():
            shutil.rmtree(target)
    return result | peak.peaks | sizes(model, policy, dtype)


def largest_file(model: str) -> int:
    """Bytes of the largest file of a model."""
    return max(path.stat().st_size for path in Path(model).glob("*.safetensors"))


def sizes(model: str, policy: torch.nn.Module, dtype: str) -> dict[str, int]:
    """Bytes of the model in this data type, and of its two largest files."""
    num = 0
    for path in Path(model).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                num += torch.Size(file.get_slice(name).get_shape()).numel()
    files = sorted(path.stat().st_size for path in Path(model).glob("*.safetensors"))
    width = 2 if dtype == "bf16" else 4
    return {"model": num * width, "two_files": sum(files[-2:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["make", "measure"])
    parser.add_argument("model")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--files", type=int, default=6)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--train", choices=["true", "false"], default="false")
    options = parser.parse_args()
    if options.what == "make":
        dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
        make(
            Path(options.model),
            hidden=options.hidden,
            layers=options.layers,
            files=options.files,
            dtype=dtype,
        )
        return
    dist.init(timeout_seconds=600)
    row = measure(options.model, dtype=options.dtype, train=options.train == "true")
    rows = dist.all_gather(row)
    if dist.is_main():
        print("\n".join(map(json.dumps, rows)), flush=True)


if __name__ == "__main__":
    main()

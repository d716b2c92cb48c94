"""Writes weights to safetensors files as they are gathered, never a whole model at once."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Bucket = list[tuple[str, Tensor]]
ALIGNMENT = 8
"""Bytes at whose multiples tensors of any data type begin."""
MAX_FILE_BYTES = 2 << 30
"""Largest file of a saved model, except for a single larger weight."""
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def buckets(named_tensors: Iterable[tuple[str, Tensor]], num_bytes: int) -> Iterator[Bucket]:
    """Copies tensors into buckets.

    Copies are needed since a sharded engine's gathered tensor lasts only until the next one.

    Args:
        named_tensors: names and tensors.
        num_bytes: largest size of a bucket; a larger tensor has a bucket of its own.
    """
    bucket: Bucket = []
    size = 0
    for name, tensor in named_tensors:
        if bucket and size + tensor.nbytes > num_bytes:
            yield bucket
            bucket = []
            size = 0
        bucket.append((name, tensor.detach().clone(memory_format=torch.contiguous_format)))
        size += tensor.nbytes
    if bucket:
        yield bucket


def write_shards(
    folder: Path, named_tensors: Iterable[tuple[str, Tensor]], num_bytes: int
) -> dict[str, str]:
    """Writes model-00000.safetensors and so on, holding one file's worth of weights.

    Args:
        folder: an existing folder.
        named_tensors: names and tensors; each tensor may last only until the next one.
        num_bytes: largest size of a file; a larger tensor has a file of its own.

    Returns:
        File name of each weight.
    """
    files: dict[str, str] = {}
    for number, shard in enumerate(_staged(named_tensors, num_bytes)):
        file = f"model-{number:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(shard, file)
    return files


def _staged(
    named_tensors: Iterable[tuple[str, Tensor]], num_bytes: int
) -> Iterator[dict[str, Tensor]]:
    """Copies tensors into one buffer on the host, and yields what it holds when it is full.

    One buffer, because the freed copies of many sizes would stay with the process.
    """
    buffer = torch.empty(num_bytes, dtype=torch.uint8)
    shard: dict[str, Tensor] = {}
    used = 0
    for name, tensor in named_tensors:
        size = math.ceil(tensor.nbytes / ALIGNMENT) * ALIGNMENT
        if shard and used + size > num_bytes:
            yield shard
            shard = {}
            used = 0
        if size > num_bytes:
            yield {name: tensor.detach().cpu().contiguous()}
            continue
        place = buffer[used : used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        shard[name] = place.copy_(tensor.detach())
        used += size
    if shard:
        yield shard


def write_index(folder: Path, files: dict[str, str], *, total_size: int | None = None) -> None:
    """Writes the index of sharded weights.

    Args:
        folder: folder of the files.
        files: file name of each weight.
        total_size: bytes of all weights, if known.
    """
    metadata = {} if total_size is None else {"total_size": total_size}
    text = json.dumps({"metadata": metadata, "weight_map": files}, indent=2)
    (folder / INDEX).write_text(text)


def write_weights(
    folder: Path, named_tensors: Iterable[tuple[str, Tensor]], num_bytes: int
) -> None:
    """Writes the weights of a Hugging Face folder: one file, or several with an index.

    Args:
        folder: an existing folder without weights.
        named_tensors: as for `write_shards`.
        num_bytes: as for `write_shards`.
    """
    total_size = 0

    def counted() -> Iterator[tuple[str, Tensor]]:
        nonlocal total_size
        for name, tensor in named_tensors:
            total_size += tensor.nbytes
            yield name, tensor

    files = write_shards(folder, counted(), num_bytes)
    shards = list(dict.fromkeys(files.values()))
    final = {
        shard: f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number, shard in enumerate(shards, start=1)
    }
    if len(shards) == 1:
        final[shards[0]] = SINGLE
    for shard, name in final.items():
        (folder / shard).rename(folder / name)
    if len(shards) > 1:
        write_index(
            folder,
            {name: final[file] for name, file in files.items()},
            total_size=total_size,
        )


def read_weights(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Reads weights that `write_weights` wrote, one at a time.

    Args:
        folder: the folder.
        names: weights to read, in this order.
    """
    index = folder / INDEX
    files = json.loads(index.read_text())["weight_map"] if index.exists() else {}
    for name in names:
        with safe_open(folder / files.get(name, SINGLE), framework="pt") as file:
            yield name, file.get_tensor(name)

"""Requests to an sglang server, as plain data: one function or constant for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .sampler import SamplingParams

GROUP = "verippo"
"""Name of the process group that weights are broadcast in."""

ASLEEP = "asleep"
"""Weight version of a server whose memory was released; it must be resumed before use."""


class Request(NamedTuple):
    """An HTTP request."""

    path: str
    body: dict[str, Any] | None = None
    """JSON object of a POST; None for a GET."""


def generate_request(
    token_ids: Sequence[int],
    params: SamplingParams,
    *,
    seed: int,
    stop_token_ids: Sequence[int],
    rid: str,
) -> Request:
    """Request for one response.

    Args:
        token_ids: the prompt.
        params: sampling parameters.
        seed: 63 bits; ignored unless the server has --enable-deterministic-inference.
        stop_token_ids: ids that end the response.
        rid: id by which the request can be aborted.
    """
    sampling = {
        "temperature": params.temperature,
        "max_new_tokens": params.max_new_tokens,
        "stop_token_ids": list(stop_token_ids),
        "sampling_seed": seed,
        "top_p": 1.0,  # the defaults may come from the model's generation_config.json
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    body = {
        "input_ids": list(token_ids),
        "sampling_params": sampling,
        "return_logprob": True,
        "rid": rid,
    }
    return Request("/generate", body)


def score_request(token_ids: Sequence[int]) -> Request:
    """Request for the log-probs of a given sequence; nothing is sampled."""
    sampling = {"temperature": 1.0, "max_new_tokens": 0}
    body = {
        "input_ids": list(token_ids),
        "sampling_params": sampling,
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    return Request("/generate", body)


def abort_request(rid: str) -> Request:
    """Request to end the running request with this id."""
    return Request("/abort_request", {"rid": rid})


def flush_request(timeout_seconds: float) -> Request:
    """Request to clear the key-value cache, after waiting until no request is running."""
    return Request(f"/flush_cache?timeout={timeout_seconds:g}", {})


def version_request(version: str) -> Request:
    """Request to set the weight version, without changing weights or aborting requests."""
    return Request("/update_weight_version", {"new_version": version, "abort_all_requests": False})


def disk_request(folder: str, version: str) -> Request:
    """Request to load the weights of a folder that the server can read."""
    return Request("/update_weights_from_disk", {"model_path": folder, "weight_version": version})


def join_request(
    *,
    address: str,
    port: int,
    rank_offset: int,
    world_size: int,
    backend: str,
) -> Request:
    """Request to join the process group of a weight broadcast.

    Args:
        address: host of rank 0.
        port: port of rank 0.
        rank_offset: rank in the group of the server's first tensor-parallel rank.
        world_size: number of ranks in the group.
        backend: nccl or gloo.
    """
    body = {
        "master_address": address,
        "master_port": port,
        "rank_offset": rank_offset,
        "world_size": world_size,
        "group_name": GROUP,
        "backend": backend,
    }
    return Request("/init_weights_update_group", body)


LEAVE = Request("/destroy_weights_update_group", {"group_name": GROUP})
"""Leaves that group."""

BEGIN = Request("/begin_weight_update", {"selector": "all"})
"""Begins a weight update (version 0.5.21 or newer)."""

END = Request("/end_weight_update", {})
"""Ends a weight update."""

RELEASE = Request("/release_memory_occupation", {})
"""Releases GPU memory. A server that is not idle would crash: flush its cache first."""

RESUME = Request("/resume_memory_occupation", {})
"""Allocates the memory again, without its contents. A server that is not asleep would crash."""


def broadcast_request(weights: Sequence[tuple[str, str, Sequence[int]]], version: str) -> Request:
    """Request to receive weights, by one broadcast for each tensor in order.

    Args:
        weights: name, dtype such as "float32" and shape of each tensor.
        version: weight version to set. The caller flushes the cache at the end.
    """
    names, dtypes, shapes = zip(*weights, strict=True)
    body = {
        "names": list(names),
        "dtypes": list(dtypes),
        "shapes": [list(shape) for shape in shapes],
        "group_name": GROUP,
        "weight_version": version,
        "flush_cache": False,
    }
    return Request("/update_weights_from_distributed", body)


def tensor_request(pickled: str, version: str, *, tp: int) -> Request:
    """Request to load tensors that are part of the request.

    Args:
        pickled: base64 of pickled (name, tensor) pairs.
        version: weight version to set. The caller flushes the cache at the end.
        tp: number of tensor-parallel ranks of the server; each gets the same tensors.
    """
    body = {
        "serialized_named_tensors": [pickled] * tp,
        "weight_version": version,
        "flush_cache": False,
    }
    return Request("/update_weights_from_tensor", body)

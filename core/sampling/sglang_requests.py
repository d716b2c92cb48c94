"""The requests to an sglang server, as plain data, one function for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .sampler import SamplingParams

GROUP = "verippo"
"""name of the process group that weights are broadcast in"""


ASLEEP = "asleep"
"""weight version of a server whose memory we have released: whoever comes next must wake it first"""


class Request(NamedTuple):
    path: str
    body: dict[str, Any] | None = None
    """None: a GET"""


def generate_request(
    token_ids: Sequence[int],
    params: SamplingParams,
    *,
    seed: int,
    stop_token_ids: Sequence[int],
    rid: str,
) -> Request:
    """Draws one response. The seed counts on servers started with --enable-deterministic-inference; others ignore it."""
    sampling = {
        "temperature": params.temperature,
        "max_new_tokens": params.max_new_tokens,
        "stop_token_ids": list(stop_token_ids),
        "sampling_seed": seed,
        "top_p": 1.0,  # the server's defaults may come from the model's generation_config.json
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
    """The log-probs of a given sequence; nothing is drawn."""
    sampling = {"temperature": 1.0, "max_new_tokens": 0}
    body = {
        "input_ids": list(token_ids),
        "sampling_params": sampling,
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    return Request("/generate", body)


def abort_request(rid: str) -> Request:
    """Ends a request of ours that still runs."""
    return Request("/abort_request", {"rid": rid})


def flush_request(timeout_seconds: float) -> Request:
    """Forgets cached keys and values once nothing runs any more."""
    return Request(f"/flush_cache?timeout={timeout_seconds:g}", {})


def version_request(version: str) -> Request:
    """Names the weights that the server holds, touching neither them nor running requests."""
    return Request("/update_weight_version", {"new_version": version, "abort_all_requests": False})


def disk_request(folder: str, version: str) -> Request:
    """Loads the weights of a folder that the server can read."""
    return Request("/update_weights_from_disk", {"model_path": folder, "weight_version": version})


def join_request(
    *,
    address: str,
    port: int,
    rank_offset: int,
    world_size: int,
    backend: str,
) -> Request:
    """Joins the process group of a weight broadcast: tensor-parallel rank r becomes rank_offset + r of world_size."""
    place = {
        "master_address": address,
        "master_port": port,
        "rank_offset": rank_offset,
        "world_size": world_size,
    }
    return Request("/init_weights_update_group", {**place, "group_name": GROUP, "backend": backend})


LEAVE = Request("/destroy_weights_update_group", {"group_name": GROUP})
"""leaves that group"""


BEGIN = Request("/begin_weight_update", {"selector": "all"})
"""opens a weight update (0.5.21 on)"""


END = Request("/end_weight_update", {})
"""closes it"""


RELEASE = Request("/release_memory_occupation", {})
"""gives the GPU's memory back; on a server that is not idle this is fatal: flush first"""


RESUME = Request("/resume_memory_occupation", {})
"""takes it again, its content lost; on a server that is not asleep this is fatal"""


def broadcast_request(weights: Sequence[tuple[str, str, Sequence[int]]], version: str) -> Request:
    """Takes part in one broadcast for each (name, dtype such as "float32", shape), in order. The caller flushes at the end."""
    names, dtypes, shapes = ([weight[part] for weight in weights] for part in range(3))
    tensors = {
        "names": names,
        "dtypes": dtypes,
        "shapes": [list(shape) for shape in shapes],
        "group_name": GROUP,
    }
    return Request(
        "/update_weights_from_distributed",
        {**tensors, "weight_version": version, "flush_cache": False},
    )


def tensor_request(pickled: str, version: str, *, tp: int) -> Request:
    """Takes base64 of pickled (name, tensor) pairs, the same for each of `tp` tensor-parallel ranks."""
    body = {
        "serialized_named_tensors": [pickled] * tp,
        "weight_version": version,
        "flush_cache": False,
    }
    return Request("/update_weights_from_tensor", body)

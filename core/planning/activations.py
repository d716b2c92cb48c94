"""Memory of a decoder's passes: activations, log-probs, key-value cache.

For transformers' decoders with RMS norms and gated MLPs (Llama, Qwen2, Qwen3), over packed
sequences. T is the number of tokens, B the bytes of the dtype, h, i, q and k the sizes of a token's
hidden state, MLP, queries and keys.
"""

from __future__ import annotations

from .model_shape import ModelShape

CHUNK_TOKENS = {"cpu": 128, "cuda": 512}
"""Rows whose logits exist at once in `linear_logprobs`."""


def layer_activations(
    shape: ModelShape,
    tokens: int,
    *,
    size: int,
    device: str = "cuda",
) -> float:
    """Bytes that a layer stores for its backward pass.

        T (2 h (4 + 2 B) + 8 + B (2 q + 2 k) + 4 heads + 4 B i)

    Each norm stores its input in fp32, the normalised and the scaled one; attention its queries,
    keys, values, result and log-sum-exps; the MLP gate, activated gate, up projection and product.
    On CPU the result of attention is copied once; the norms of queries and keys, where a family
    has them, store them in fp32 and normalised.

    Args:
        shape: sizes of the model.
        tokens: number of tokens.
        size: bytes of a number.
        device: cuda or cpu.
    """
    norms = 2 * shape.hidden * (4 + 2 * size) + 8
    attention = size * (2 * shape.query_size + 2 * shape.kv_size) + 4 * shape.heads
    if device == "cpu":
        attention += size * shape.query_size
    if shape.qk_norm:
        attention += (4 + size) * (shape.query_size + shape.kv_size)
        attention += 4 * (shape.heads + shape.kv_heads)
    return tokens * (norms + attention + 4 * size * shape.intermediate)


def training_activations(
    shape: ModelShape,
    tokens: int,
    *,
    size: int,
    checkpointing: bool,
    device: str = "cuda",
) -> float:
    """Bytes of activations at the peak of a backward pass, without the head.

    With checkpointing each layer stores its input, B h T, and one layer at a time is recomputed;
    without, every layer stores all its activations. On top come the gradients of a layer's MLP, and
    the norm behind the last layer.

    Args:
        shape: sizes of the model.
        tokens: number of tokens.
        size: bytes of a number.
        checkpointing: whether layers are recomputed.
        device: cuda or cpu.
    """
    layer = layer_activations(shape, tokens, size=size, device=device)
    inputs = tokens * size * shape.hidden * shape.layers
    stored = inputs + layer if checkpointing else layer * shape.layers
    gradients = tokens * (2 * size * shape.intermediate + 2 * (4 + size) * shape.hidden)
    last_norm = tokens * shape.hidden * (4 + 2 * size)
    return stored + gradients + last_norm


def forward_activations(shape: ModelShape, tokens: int, *, size: int) -> float:
    """Bytes of a pass without gradients: residual, normed input and three tensors of the MLP.

    T B (2 h + 3 i), or T (2 B h + 8 h) in a norm where that is more.
    """
    mlp = size * (2 * shape.hidden + 3 * shape.intermediate)
    norm = (2 * size + 8) * shape.hidden
    return tokens * max(mlp, norm)


def logprob_memory(
    shape: ModelShape,
    tokens: int,
    *,
    size: int,
    backward: bool,
    entropy: bool = False,
    device: str = "cuda",
) -> float:
    """Bytes that `linear_logprobs` takes: one chunk of logits, and gradients in its backward pass.

    The head's gradient is summed in fp32, 4 V h, and then cast. On CPU a bf16 weight is cast to
    fp32 first.

    Args:
        shape: sizes of the model.
        tokens: response tokens of the micro-batch.
        size: bytes of a number.
        backward: whether gradients are computed.
        entropy: whether entropies are, which takes a second chunk.
        device: cuda or cpu.
    """
    chunk = 4 * min(tokens, CHUNK_TOKENS[device]) * shape.vocabulary * (2 if entropy else 1)
    memory = chunk + tokens * size * shape.hidden
    if backward:
        cast = size if size < 4 else 0
        memory += (4 + cast) * shape.embedding + tokens * size * shape.hidden
    if device == "cpu" and size < 4:
        memory += 4 * shape.embedding
    return memory


def kv_bytes_per_token(shape: ModelShape, *, size: int) -> int:
    """Bytes of a token's keys and values in all layers: 2 L k B."""
    return 2 * shape.layers * shape.kv_size * size


def local_sampler_memory(
    shape: ModelShape,
    *,
    slots: int,
    prompt_tokens: int,
    new_tokens: int,
    size: int,
) -> tuple[float, float]:
    """Bytes of the local sampler beside its weights.

    Args:
        shape: sizes of the model.
        slots: responses decoded at once.
        prompt_tokens: length of the longest prompt.
        new_tokens: longest response.
        size: bytes of a number.

    Returns:
        The key-value cache, and the larger of a pass over all prompts and one draw, which holds
        logits, their fp32 log-softmax and two float64 copies.
    """
    cache = slots * (prompt_tokens + new_tokens) * kv_bytes_per_token(shape, size=size)
    prompts = forward_activations(shape, slots * prompt_tokens, size=size)
    draw = slots * shape.vocabulary * (size + 4 + 4 + 8 + 8)
    return cache, max(prompts, draw)

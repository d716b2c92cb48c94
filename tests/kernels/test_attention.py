import importlib.util
import inspect
import math
import sys
import types
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verippo.kernels import attention, reference
from verippo.kernels.attention import choose_backend, varlen_attention


def inputs(lengths, heads, kv_heads, dim, *, dtype=torch.float64, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    qkv = [
        torch.randn(sum(lengths), n, dim, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]
    return qkv, list(accumulate(lengths, initial=0))


def test_two_tokens_worked_by_hand():
    # Token 0 sees itself alone. Token 1: scores ln 3 * (0, 1), weights 1/4 and 3/4, output 1/4 * 1
    # + 3/4 * 5 = 4.
    query, key, value = (
        torch.tensor(x).view(2, 1, 1) for x in ([7.0, math.log(3)], [0.0, 1.0], [1.0, 5.0])
    )
    assert varlen_attention(query, key, value, [0, 2], 2).flatten().tolist() == pytest.approx(
        [1.0, 4.0]
    )


def test_scale_multiplies_the_scores_worked_by_hand():
    # Scale 2 squares the odds 1:3 to 1:9: 1/10 * 1 + 9/10 * 5 = 4.6
    query, key, value = (
        torch.tensor(x).view(2, 1, 1) for x in ([7.0, math.log(3)], [0.0, 1.0], [1.0, 5.0])
    )
    assert varlen_attention(
        query, key, value, [0, 2], 2, scale=2.0
    ).flatten().tolist() == pytest.approx([1.0, 4.6])


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 10**6),
)
def test_values_and_gradients_equal_the_explicit_softmax_in_float64(lengths, heads, scale, seed):
    qkv, boundaries = inputs(lengths, *heads, 5, seed=seed)
    got = varlen_attention(*qkv, boundaries, max(lengths), scale=scale)
    expected = reference.varlen_attention(*qkv, boundaries, scale=scale)
    assert got.shape == qkv[0].shape
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    factor = torch.randn(
        got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    if sum(lengths) > 0:
        a, b = (torch.autograd.grad((out * factor).sum(), qkv) for out in (got, expected))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_equals_the_float64_twin_within_the_dtype(dtype, tolerance):
    qkv, boundaries = inputs([17, 1, 33], 4, 2, 16, dtype=dtype)
    got = varlen_attention(*qkv, boundaries, 33)
    assert got.dtype == dtype
    wide = [x.detach().double().requires_grad_() for x in qkv]
    expected = reference.varlen_attention(*wide, boundaries)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)
    grads, wide_grads = (
        torch.autograd.grad(got.sum(), qkv),
        torch.autograd.grad(expected.sum(), wide),
    )
    for a, b in zip(grads, wide_grads, strict=True):
        assert float((a.double() - b).abs().max() / b.abs().max()) < tolerance


def test_boundaries_as_a_tensor_or_a_list_are_the_same():
    qkv, boundaries = inputs([3, 4], 2, 1, 8)
    expected = varlen_attention(*qkv, boundaries, 4)
    assert torch.equal(
        varlen_attention(*qkv, torch.tensor(boundaries, dtype=torch.int32), 4), expected
    )
    assert torch.equal(varlen_attention(*qkv, tuple(boundaries), 4), expected)


def test_a_sequence_full_of_nan_reaches_no_other():
    qkv, boundaries = inputs([3, 4, 2], 2, 1, 8)
    expected = varlen_attention(*qkv, boundaries, 4)
    spoiled = [x.detach().clone() for x in qkv]
    for x in spoiled:
        x[3:7] = float("nan")
    got = varlen_attention(*spoiled, boundaries, 4)
    assert torch.equal(got[:3], expected[:3])
    assert torch.equal(got[7:], expected[7:])


def test_later_tokens_change_nothing_before_them():
    qkv, boundaries = inputs([6], 2, 2, 8)
    shorter = varlen_attention(*(x[:4] for x in qkv), [0, 4], 4)
    torch.testing.assert_close(
        varlen_attention(*qkv, boundaries, 6)[:4], shorter, rtol=0, atol=1e-14
    )


def test_no_tokens_stay_connected_to_the_graph():
    for boundaries in ([0], [0, 0], [0, 0, 0]):
        qkv, _ = inputs([0], 4, 2, 8)
        out = varlen_attention(*qkv, boundaries, 0)
        assert out.shape == (0, 4, 8)
        out.sum().backward()
        assert all(x.grad is not None and x.grad.shape == x.shape for x in qkv)


def test_the_cpu_and_fp32_use_sdpa():
    assert choose_backend(torch.zeros(3, 1, 8)) == "sdpa"
    assert choose_backend(torch.zeros(3, 1, 8, dtype=torch.bfloat16)) == "sdpa"


def test_flash_attn_comes_before_torch_and_torch_before_sdpa(monkeypatch):
    find_spec = importlib.util.find_spec
    for installed, expected in ((True, "flash_attn"), (False, "torch_varlen")):
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, installed=installed: installed and find_spec("torch") or None,
        )
        attention._fused_backend.cache_clear()
        assert attention._fused_backend() == expected
    import torch.nn.attention.varlen as varlen

    monkeypatch.setattr(
        varlen, "varlen_attn", lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k: None
    )
    attention._fused_backend.cache_clear()
    assert attention._fused_backend() == "sdpa"
    attention._fused_backend.cache_clear()


def twin_of_a_fused_kernel(q, k, v, cu_q, cu_k, max_q, max_k, scale):
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert torch.equal(cu_q, cu_k)
    assert max_q == max_k == 5
    return reference.varlen_attention(q, k, v, cu_q.tolist(), scale=scale)


def test_torch_varlen_is_called_as_its_signature_says(monkeypatch):
    import torch.nn.attention.varlen as varlen

    signature = inspect.signature(varlen.varlen_attn)

    def fake(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        assert given["window_size"] == (-1, 0)  # causal
        assert given["enable_gqa"] is True
        return twin_of_a_fused_kernel(*args, given["scale"])

    monkeypatch.setattr(varlen, "varlen_attn", fake)
    monkeypatch.setattr(attention, "choose_backend", lambda query: "torch_varlen")
    qkv, boundaries = inputs([3, 5], 4, 2, 8)
    got = varlen_attention(*qkv, boundaries, 5, scale=0.5)
    torch.testing.assert_close(got, reference.varlen_attention(*qkv, boundaries, scale=0.5))


def test_flash_attn_is_called_as_its_signature_says(monkeypatch):
    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
    ):
        assert causal is True
        assert dropout_p == 0.0
        return twin_of_a_fused_kernel(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale
        )

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(attention, "choose_backend", lambda query: "flash_attn")
    qkv, boundaries = inputs([3, 5], 4, 2, 8)
    got = varlen_attention(*qkv, torch.tensor(boundaries), 5)
    torch.testing.assert_close(got, reference.varlen_attention(*qkv, boundaries))


@pytest.mark.parametrize(
    ("query", "key", "value", "boundaries", "message"),
    [
        ((3, 8), (3, 8), (3, 8), [0, 3], "tokens, heads, dim"),
        ((3, 2, 8), (4, 2, 8), (4, 2, 8), [0, 3], "tokens, heads, dim"),
        ((3, 2, 8), (3, 2, 8), (3, 1, 8), [0, 3], "tokens, heads, dim"),
        ((3, 3, 8), (3, 2, 8), (3, 2, 8), [0, 3], "heads a multiple of kv_heads"),
        ((3, 2, 8), (3, 2, 4), (3, 2, 4), [0, 3], "dim must be the same"),
        ((3, 2, 8), (3, 2, 8), (3, 2, 8), [0, 2], "must rise from 0 to the 3 tokens"),
        ((3, 2, 8), (3, 2, 8), (3, 2, 8), [1, 3], "must rise from 0 to the 3 tokens"),
        ((3, 2, 8), (3, 2, 8), (3, 2, 8), [0, 4, 3], "must rise from 0 to the 3 tokens"),
        ((3, 2, 8), (3, 2, 8), (3, 2, 8), torch.tensor([0, 2]), "must rise from 0 to the 3 tokens"),
        ((3, 2, 8), (3, 2, 8), (3, 2, 8), [], "must rise from 0 to the 3 tokens"),
    ],
)
def test_wrong_shapes_are_refused(query, key, value, boundaries, message):
    with pytest.raises(ValueError, match=message):
        varlen_attention(torch.zeros(query), torch.zeros(key), torch.zeros(value), boundaries, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
def test_gpu_equals_the_float64_twin(dtype, heads):
    qkv, boundaries = inputs([65, 1, 200, 31], *heads, 64, dtype=dtype, device="cuda")
    backends = (
        ["sdpa"]
        if dtype == torch.float32
        else list(dict.fromkeys(["sdpa", attention._fused_backend()]))
    )
    wide = [x.detach().double().requires_grad_() for x in qkv]
    expected = reference.varlen_attention(*wide, boundaries)
    wide_grads = torch.autograd.grad(expected.sum(), wide)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for backend in backends:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "choose_backend", lambda query, backend=backend: backend)
            got = varlen_attention(*qkv, boundaries, 200)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)
        for a, b in zip(torch.autograd.grad(got.sum(), qkv), wide_grads, strict=True):
            assert float((a.double() - b).abs().max() / b.abs().max()) < tolerance

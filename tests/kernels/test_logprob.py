import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verippo.kernels import reference
from verippo.kernels.logprob import linear_logprobs


def inputs(n, h, v, *, dtype=torch.float32, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    hidden = (
        torch.randn(n, h, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .requires_grad_()
    )
    weight = (
        torch.randn(v, h, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .requires_grad_()
    )
    return hidden, weight, torch.randint(v, (n,), generator=generator).to(device)


def gradients(outputs, weights, *leaves):
    """Gradients of the weighted sum of several outputs."""
    return torch.autograd.grad(
        sum((out * w).sum() for out, w in zip(outputs, weights, strict=True)), leaves
    )


def relative_error(got, expected):
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())


def test_two_words_worked_by_hand():
    # logits (0, ln 3): probabilities 1/4 and 3/4, entropy ln 4 - 3/4 ln 3
    hidden, weight = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [math.log(3)]])
    logprobs, entropy = linear_logprobs(hidden, weight, torch.tensor([0, 1]), with_entropy=True)
    assert logprobs.tolist() == pytest.approx([math.log(1 / 4), math.log(3 / 4)], abs=1e-6)
    assert entropy.tolist() == pytest.approx([math.log(4) - 3 / 4 * math.log(3)] * 2, abs=1e-6)


def test_temperature_one_half_squares_the_odds_worked_by_hand():
    # odds 1:3 become 1:9
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [math.log(3)]])
    assert linear_logprobs(
        hidden, weight, torch.tensor([1]), temperature=0.5
    ).item() == pytest.approx(math.log(0.9))


def test_gradients_worked_by_hand():
    # d logprob[1] / d logits = (-1/4, 1/4); times hidden = 2 for the weight, times weight = (0, ln
    # 3 / 2) for hidden
    hidden = torch.tensor([[2.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3) / 2]], requires_grad=True)
    linear_logprobs(hidden, weight, torch.tensor([1])).sum().backward()
    assert weight.grad.flatten().tolist() == pytest.approx([-0.5, 0.5], abs=1e-6)
    assert hidden.grad.item() == pytest.approx(math.log(3) / 8, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 13),
    h=st.integers(1, 9),
    v=st.integers(1, 17),
    chunk=st.integers(1, 15),
    temperature=st.floats(0.3, 3),
    seed=st.integers(0, 10**6),
)
def test_values_and_gradients_equal_dense_twin_in_float64(n, h, v, chunk, temperature, seed):
    hidden, weight, targets = inputs(n, h, v, dtype=torch.float64, seed=seed)
    expected = reference.linear_logprobs(hidden, weight, targets, temperature=temperature)
    got = linear_logprobs(
        hidden, weight, targets, temperature=temperature, with_entropy=True, chunk_tokens=chunk
    )
    factors = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for a, b in zip(
        gradients(got, factors, hidden, weight),
        gradients(expected, factors, hidden, weight),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_gradients_equal_dense_autograd_to_1e_6_in_fp32(with_entropy):
    hidden, weight, targets = inputs(301, 48, 1009)
    expected = reference.linear_logprobs(hidden, weight, targets, temperature=0.7)
    got = linear_logprobs(hidden, weight, targets, temperature=0.7, with_entropy=with_entropy)
    factors = torch.randn(2, 301, generator=torch.Generator().manual_seed(1)) / 301
    if not with_entropy:
        got, expected = (got,), expected[:1]
    factors = factors[: len(got)]
    for a, b in zip(
        gradients(got, factors, hidden, weight),
        gradients(expected, factors, hidden, weight),
        strict=True,
    ):
        assert relative_error(a, b) < 1e-6
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_numerical_gradients_agree(with_entropy):
    hidden, weight, targets = inputs(5, 3, 7, dtype=torch.float64)

    def function(hidden, weight):
        return linear_logprobs(
            hidden, weight, targets, temperature=1.3, with_entropy=with_entropy, chunk_tokens=2
        )

    assert torch.autograd.gradcheck(function, (hidden, weight))


def test_an_unused_output_changes_no_gradient():
    hidden, weight, targets = inputs(9, 4, 11, dtype=torch.float64)
    logprobs, entropy = linear_logprobs(hidden, weight, targets, with_entropy=True)
    dense_logprobs, dense_entropy = reference.linear_logprobs(hidden, weight, targets)
    for got, expected in ((logprobs, dense_logprobs), (entropy, dense_entropy)):
        a = torch.autograd.grad(got.sum(), (hidden, weight), retain_graph=True)
        b = torch.autograd.grad(expected.sum(), (hidden, weight), retain_graph=True)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_chunk_size_changes_nothing():
    hidden, weight, targets = inputs(37, 5, 19, dtype=torch.float64)
    whole = linear_logprobs(hidden, weight, targets, chunk_tokens=1000)
    for chunk in (1, 2, 36, 37, 38):
        torch.testing.assert_close(
            linear_logprobs(hidden, weight, targets, chunk_tokens=chunk), whole, rtol=0, atol=1e-13
        )


@pytest.mark.parametrize("with_entropy", [False, True])
def test_no_tokens_give_empty_outputs_and_zero_gradients(with_entropy):
    hidden, weight, targets = inputs(0, 4, 11)
    out = linear_logprobs(hidden, weight, targets, with_entropy=with_entropy)
    outs = out if with_entropy else (out,)
    assert all(o.shape == (0,) and o.requires_grad for o in outs)
    sum(o.sum() for o in outs).backward()
    assert hidden.grad.shape == (0, 4)
    assert weight.grad.shape == (11, 4)
    assert not weight.grad.any()


def test_frozen_inputs_get_no_gradient():
    hidden, weight, targets = inputs(3, 4, 5)
    linear_logprobs(hidden, weight.detach(), targets).sum().backward()
    expected = hidden.grad.clone()
    hidden.grad = None
    linear_logprobs(hidden.detach(), weight, targets).sum().backward()
    assert hidden.grad is None
    assert weight.grad is not None
    assert not linear_logprobs(hidden.detach(), weight.detach(), targets).requires_grad
    linear_logprobs(hidden, weight, targets).sum().backward()
    torch.testing.assert_close(hidden.grad, expected)


def test_logits_of_ten_thousand_stay_finite():
    # logits (0, 10^4): the second word is certain, the first has log-probability -10^4
    hidden, weight = torch.tensor([[100.0], [100.0]]), torch.tensor([[0.0], [100.0]])
    logprobs, entropy = linear_logprobs(hidden, weight, torch.tensor([0, 1]), with_entropy=True)
    assert logprobs.tolist() == [-10_000.0, 0.0]
    assert entropy.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_accumulated_in_fp32(dtype):
    hidden, weight, targets = inputs(70, 96, 501, dtype=dtype)
    got = linear_logprobs(hidden, weight, targets, with_entropy=True)
    wide_hidden, wide_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    expected = reference.linear_logprobs(wide_hidden, wide_weight, targets)
    assert got.logprobs.dtype == got.entropy.dtype == torch.float32
    for a, b in zip(
        got, expected, strict=True
    ):  # from the same rounded inputs: only fp32 sums differ
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-5)
    factors = torch.ones(2, 70)
    grads = gradients(got, factors, hidden, weight)
    assert [g.dtype for g in grads] == [dtype, dtype]
    for a, b in zip(
        grads, gradients(expected, factors.double(), wide_hidden, wide_weight), strict=True
    ):
        assert relative_error(a, b) < 2**-8  # one rounding to bf16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": torch.tensor([0, 5, 1])}, r"targets\[1\] is 5, outside the vocabulary 0\.\.4"),
        ({"targets": torch.tensor([0, 1, -100])}, r"targets\[2\] is -100"),
        ({"targets": torch.tensor([0, 1])}, "shapes"),
        ({"targets": torch.tensor([0.0, 1.0, 1.0])}, "int64"),
        ({"weight": torch.zeros(5, 3)}, "shapes"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
    ],
)
def test_wrong_arguments_are_refused_by_name(changes, message):
    arguments = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(5, 4),
        "targets": torch.tensor([0, 1, 4]),
    } | changes
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**arguments)


PEAK_MEMORY = """
import sys
import torch
from verippo.kernels.logprob import linear_logprobs

def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1024

def step(n):
    targets = torch.arange(n) % 32000
    if sys.argv[1] == "dense":
        loss = torch.log_softmax(hidden[:n] @ weight.T, dim=-1).gather(1, targets[:, None]).sum()
    elif sys.argv[1] == "entropy":
        logprobs, entropy = linear_logprobs(hidden[:n], weight, targets, with_entropy=True)
        loss = logprobs.sum() + entropy.sum()
    else:
        loss = linear_logprobs(hidden[:n], weight, targets).sum()
    loss.backward()

hidden = torch.randn(4096, 64, requires_grad=True)
weight = torch.randn(32000, 64).mul_(0.1).requires_grad_()
step(1)
before = status("VmRSS")
step(4096)
print(status("VmHWM") - before)
"""


def peak_memory_mib(form):
    # VmHWM and not ru_maxrss: the latter starts from the parent's peak, which pytest's own imports
    # may have raised.
    done = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY, form],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return float(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
def test_peak_memory_at_4096_tokens_and_32000_words_is_under_an_eighth_of_the_dense_form():
    dense, chunked, with_entropy = (
        peak_memory_mib(form) for form in ("dense", "chunked", "entropy")
    )
    assert dense > 1000  # logits and log-softmax alone are 1000 MiB: the measure works
    assert chunked < dense / 8
    assert with_entropy < dense / 8


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_equals_dense_float64_twin(dtype):
    hidden, weight, targets = inputs(1031, 256, 5003, dtype=dtype, device="cuda")
    got = linear_logprobs(hidden, weight, targets, temperature=0.8, with_entropy=True)
    wide_hidden, wide_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    expected = reference.linear_logprobs(wide_hidden, wide_weight, targets, temperature=0.8)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-4)
    factors = torch.ones(2, 1031, device="cuda")
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    for a, b in zip(
        gradients(got, factors, hidden, weight),
        gradients(expected, factors.double(), wide_hidden, wide_weight),
        strict=True,
    ):
        assert relative_error(a, b) < tolerance


@settings(deadline=None)
@given(
    n=st.integers(1, 9),
    chunk=st.integers(1, 10),
    temperature=st.sampled_from([1.0, 0.6]),
    factor=st.sampled_from([1.0, -0.25, 0.0, 1e-4]),
    seed=st.integers(0, 99),
)
def test_gradients_made_in_the_forward_pass_are_those_of_the_backward_pass(
    n, chunk, temperature, factor, seed
):
    """The loss is the sum of a_i exp(logprob_i): its slope depends on the log-probs."""
    hidden, weight, targets = inputs(n, 5, 11, seed=seed)
    advantages = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    advantages[0] = 0.0
    asked = []

    def slope(logprobs, rows):
        asked.append(rows)
        return advantages[rows] * logprobs.exp()

    def gradients_of(**options):
        logprobs = linear_logprobs(
            hidden, weight, targets, temperature=temperature, chunk_tokens=chunk, **options
        )
        return torch.autograd.grad((advantages * logprobs.exp()).sum() * factor, (hidden, weight))

    expected = gradients_of()
    for got, known in zip(gradients_of(slope=slope), expected, strict=True):
        torch.testing.assert_close(got, known, rtol=1e-6, atol=1e-7)
    assert len(asked) == -(-n // chunk)


def test_a_slope_that_is_not_the_losss_changes_no_gradient():
    hidden, weight, targets = inputs(6, 4, 9)
    g = torch.tensor([1.0, 2.0, 0.0, -1.0, 0.5, 3.0])

    def gradients_of(**options):
        logprobs = linear_logprobs(hidden, weight, targets, chunk_tokens=4, **options)
        return torch.autograd.grad((g * logprobs).sum(), (hidden, weight))

    wrong = g.clone()
    wrong[3] = 1.0
    zero = torch.zeros(6)
    for other in (wrong, zero):
        made = gradients_of(slope=lambda logprobs, rows, other=other: other[rows])
        for got, known in zip(made, gradients_of(), strict=True):
            torch.testing.assert_close(got, known, rtol=0, atol=0)


def test_the_slope_is_not_asked_where_no_gradient_is_wanted():
    hidden, weight, targets = inputs(3, 4, 9)

    def slope(logprobs, rows):
        raise AssertionError

    with torch.no_grad():
        linear_logprobs(hidden, weight, targets, slope=slope)
    linear_logprobs(hidden, weight, targets, slope=slope, with_entropy=True)


def test_gradients_that_are_not_finite_stay_so():
    hidden, weight, targets = inputs(3, 4, 9)
    logprobs = linear_logprobs(
        hidden, weight, targets, slope=lambda logprobs, rows: torch.ones_like(logprobs)
    )
    (grad,) = torch.autograd.grad((logprobs * math.nan).sum(), weight)
    assert grad.isnan().all()


def test_a_second_backward_pass_gives_the_same_gradients():
    hidden, weight, targets = inputs(6, 4, 9)
    logprobs = linear_logprobs(
        hidden, weight, targets, slope=lambda logprobs, rows: torch.ones_like(logprobs)
    )
    first = torch.autograd.grad(3 * logprobs.sum(), (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(3 * logprobs.sum(), (hidden, weight))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)

"""merge_states against the reference, and as what it is for: halves of a cache joined give the whole."""

from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from bridge import OUTPUT_ROUNDING, decode_tensors, tensor_of_values, values_of_tensor
from cases import Case, make_problem, round_to
from comparison import assert_close, assert_close_absolute
from ragged import (
    RaggedCase,
    arrays,
    check_prefill,
    cumulative,
    make_prefill_problem,
    prefill_tensors,
    prefill_tolerance,
)

import pyquantattn


def states(shape, dtype, seed):
    rng = np.random.default_rng(seed)
    out = round_to(rng.normal(size=shape), dtype)
    lse = rng.normal(size=shape[:-1], scale=4).astype(np.float32).astype(np.float64)
    lse[0] = -np.inf if seed == 0 else lse[0]
    out[0] = 0 if seed == 0 else out[0]
    return out, lse


@pytest.mark.parametrize("shape", [(3, 4, 64), (5, 2, 6, 80), (1, 1, 1), (0, 4, 64), (4, 3, 256)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_merge_matches_the_reference(dtype, shape, device):
    if 0 in shape:
        a = b = np.zeros(shape), np.zeros(shape[:-1])
    else:
        a, b = states(shape, dtype, 0), states(shape, dtype, 1)
    given = [
        tensor_of_values(x, kind, device) for state in (a, b) for x, kind in zip(state, (dtype, "float32"), strict=True)
    ]
    out, lse = pyquantattn.merge_states(*given)
    assert out.shape == shape and lse.shape == shape[:-1] and lse.dtype == torch.float32
    expected_out, expected_lse = oracle.merge_states(*a, *b)
    assert_close(values_of_tensor(out), expected_out, relative=1e-6, rounding=OUTPUT_ROUNDING[dtype])
    assert_close_absolute(values_of_tensor(lse), expected_lse, tolerance=4e-6, what="lse")  # 2 ulp of 16


def test_two_sides_that_saw_nothing_stay_nothing(device):
    out = torch.zeros(2, 3, 64, device=device)
    lse = torch.full((2, 3), -torch.inf, device=device)
    merged, merged_lse = pyquantattn.merge_states(out, lse, out, lse)
    assert (merged == 0).all() and (merged_lse == -torch.inf).all()


def test_a_side_that_saw_nothing_may_hold_anything_finite(device):
    """A side with LSE -inf contributes nothing."""
    out, lse = torch.randn(2, 3, 64, device=device), torch.randn(2, 3, device=device)
    other = torch.full_like(out, 1e30), torch.full_like(lse, -torch.inf)
    for merged, merged_lse in (pyquantattn.merge_states(out, lse, *other), pyquantattn.merge_states(*other, out, lse)):
        torch.testing.assert_close(merged, out, rtol=1e-6, atol=0)
        assert torch.equal(merged_lse, lse)


@pytest.mark.parametrize("other", [-torch.inf, 0.0, torch.nan])
def test_a_side_that_is_nan_does_not_vanish(other, device):
    """Whichever side it is, and whatever the other one saw."""
    out, lse = torch.ones(1, 1, 64, device=device), torch.ones(1, 1, device=device)
    broken, whole = (out * torch.nan, lse * torch.nan), (out, torch.full_like(lse, other))
    for merged in (pyquantattn.merge_states(*broken, *whole), pyquantattn.merge_states(*whole, *broken)):
        assert all(x.isnan().all() for x in merged)


@pytest.mark.parametrize("kv_format", ["fp16", "int8", "fp8_e4m3"])
@pytest.mark.parametrize("num_q_tokens", [1, 2])
def test_joined_halves_equal_the_whole(num_q_tokens, kv_format, device):
    """The prefix is seen through shorter lengths, the rest through seq_starts."""
    case = Case(kv_format=kv_format, seq_lens=(130, 65, 40), num_q_tokens=num_q_tokens, q_dtype="float32", page_size=16)
    problem = make_problem(case)
    whole = [values_of_tensor(t) for t in decode_tensors(problem, device)]
    cut = np.array([64, 20, 39], np.int32) - num_q_tokens
    right = replace(problem, seq_starts=cut)
    prefix_of = [make_prefix(problem, cut, i) for i in range(num_q_tokens)]
    right_out, right_lse = decode_tensors(right, device)
    for i, prefix in enumerate(prefix_of):
        left_out, left_lse = decode_tensors(prefix, device)
        right_i = (
            (right_out, right_lse)
            if num_q_tokens == 1
            else (right_out[:, i].contiguous(), right_lse[:, i].contiguous())
        )
        merged, merged_lse = pyquantattn.merge_states(left_out, left_lse, *right_i)
        whole_i = whole if num_q_tokens == 1 else [w[:, i] for w in whole]
        assert_close(values_of_tensor(merged), whole_i[0], relative=1e-3)
        assert_close_absolute(values_of_tensor(merged_lse), whole_i[1], tolerance=1e-3, what="lse")


def make_prefix(problem, cut, token):
    """Query token `token` alone over the first `cut` keys."""
    case = replace(problem.case, num_q_tokens=1)
    return replace(problem, case=case, q=problem.q[:, token : token + 1], seq_lens=cut)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_joined_halves_of_the_keys_equal_the_whole_prefill(dtype, prefill_device):
    """Without causal order each half of every sequence's keys is a call of its own; one of the halves may be empty."""
    lens, cuts = (70, 33, 130, 5), (30, 33, 65, 0)
    case = RaggedCase(seq_lens=lens, q_lens=(9, 33, 70, 5), causal=False, q_dtype=dtype)
    problem = make_prefill_problem(case)
    check_prefill(problem, prefill_device)
    starts = cumulative(lens)
    halves = []
    for bounds in ([(0, cut) for cut in cuts], list(zip(cuts, lens, strict=True))):
        keys = np.concatenate([np.arange(s + a, s + b) for s, (a, b) in zip(starts, bounds, strict=False)])
        part = replace(case, seq_lens=tuple(b - a for a, b in bounds))
        halves += prefill_tensors(replace(problem, case=part, k=problem.k[keys], v=problem.v[keys]), prefill_device)
    out, lse = arrays(pyquantattn.merge_states(*halves))
    expected_out, expected_lse = problem.expected()
    # A half is stored in its dtype with a roundoff of its own size, which the whole, where halves cancel, may not have.
    tolerance = 2 * (prefill_tolerance(dtype, prefill_device) + OUTPUT_ROUNDING[dtype])
    assert_close(out, expected_out, relative=tolerance, rounding=OUTPUT_ROUNDING[dtype])
    assert_close_absolute(lse, expected_lse, tolerance=2 * tolerance, what="lse")


def test_strided_states(device):
    out_a, out_b = torch.randn(2, 4, 5, 64, device=device).transpose(1, 2)
    lse_a, lse_b = torch.randn(2, 5, 4, device=device)
    expected = pyquantattn.merge_states(out_a.contiguous(), lse_a, out_b.contiguous(), lse_b)
    assert torch.equal(pyquantattn.merge_states(out_a, lse_a, out_b, lse_b)[0], expected[0])

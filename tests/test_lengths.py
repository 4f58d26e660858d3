"""Every length round every boundary, and very long sequences."""

import numpy as np
import pytest
import torch
from bridge import check, kernel_tolerance, values_of_tensor
from cases import Case, make_problem

import pyquantattn


@pytest.mark.parametrize("kv_format", ["fp16", "int8", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("page_size", [1, 3, 16, 64, None])
def test_b4_every_length(page_size, kv_format, device):
    """B4: every length from 0 past two tiles and a page."""
    lens = tuple(range(2 * 64 + (page_size or 0) + 2))
    check(
        make_problem(Case(kv_format=kv_format, page_size=page_size, seq_lens=lens, num_kv_heads=1, head_dim=32)), device
    )


@pytest.mark.parametrize("kv_format", ["bf16", "int8", "fp8_e4m3"])
@pytest.mark.parametrize("num_splits", [1, 2, 3, 4, 5, 8, 13, 32, 63, 64])
def test_b3_more_splits_than_tokens(num_splits, kv_format, device):
    """B3: empty splits neither give NaN nor overwrite the LSE."""
    lens = (*range(1, 20), 31, 32, 33, 63, 64, 65, 127, 128, 129, 130)
    problem = make_problem(Case(kv_format=kv_format, seq_lens=lens, num_kv_heads=1, head_dim=32))
    check(problem, device, num_splits=num_splits)


@pytest.mark.parametrize("num_splits", [None, 2, 7, 64])
@pytest.mark.parametrize("window", [1, 3, 17])
def test_b3_windows_that_leave_most_splits_empty(window, num_splits, device):
    """B3: a window over fewer than two blocks."""
    problem = make_problem(Case(seq_lens=(1000, 130, 0, 5), sliding_window=window, num_q_tokens=2))
    check(problem, device, num_splits=num_splits)


@pytest.mark.parametrize("num_splits", [None, 3, 40])
@pytest.mark.parametrize("kv_format", ["fp16", "int8", "fp8_e4m3"])
@pytest.mark.parametrize("group", [1, 4])
def test_long_and_ragged(group, kv_format, num_splits, device):
    problem = make_problem(Case(kv_format=kv_format, seq_lens=(4097, 1, 1536, 0, 2047), group=group))
    check(problem, device, num_splits=num_splits)


@pytest.mark.parametrize(("kv_format", "group"), [("fp16", 1), ("int8", 4), ("fp8_e4m3", 16)])
@pytest.mark.parametrize(("batch_size", "length"), [(16, 700), (33, 130), (64, 100), (130, 17), (264, 40), (64, 0)])
def test_equal_lengths(batch_size, length, kv_format, group, device):
    """Batches whose work may be cut at the ends of items: whole ones, several to a block, or parts of one."""
    lens = (length,) * batch_size
    check(make_problem(Case(kv_format=kv_format, seq_lens=lens, num_kv_heads=2, group=group, head_dim=32)), device)


def needle_in_near_uniform_keys(length, kv_format, device):
    """(relative error, error of lse) against float64 of a sequence of near-uniform scores with one needle."""
    rng = np.random.default_rng(length)
    heads, dim = 2, 64
    k = (0.05 * rng.normal(size=(length, heads, dim))).astype(np.float32)
    v = (1 + 0.5 * rng.normal(size=(length, heads, dim))).astype(np.float32)
    q = rng.normal(size=(1, heads, dim)).astype(np.float32)
    k[length // 3] = q[0] * 0.6  # the needle's score stands about log(length) above the others
    cache = pyquantattn.KVCache.allocate(1, length, heads, dim, kv_format=kv_format, device=device)
    cache.append(torch.from_numpy(k).to(device), torch.from_numpy(v).to(device), torch.arange(length, device=device))
    k64, v64 = (values_of_tensor(x.float())[0] for x in cache.dequantize())
    scores = np.einsum("hd,jhd->hj", q[0].astype(np.float64), k64) / dim**0.5
    largest = scores.max(axis=1, keepdims=True)
    weights = np.exp(scores - largest)
    expected = np.einsum("hj,jhd->hd", weights / weights.sum(1, keepdims=True), v64)
    expected_lse = largest[:, 0] + np.log(weights.sum(1))
    out, lse = pyquantattn.decode_attention(
        torch.from_numpy(q).to(device),
        cache,
        seq_lens=torch.tensor([length], dtype=torch.int32, device=device),
        return_lse=True,
    )
    error = np.linalg.norm(values_of_tensor(out)[0] - expected) / np.linalg.norm(expected)
    return error, np.abs(values_of_tensor(lse)[0] - expected_lse).max()


@pytest.mark.parametrize("kv_format", ["fp16", "int8", "fp8_e4m3"])
def test_d6_the_error_does_not_grow_with_the_length(kv_format, device):
    """D6: 131,072 keys, near-uniform softmax and a needle: at most 1.5 times the error of 1,024 keys, or a tenth of the
    tolerance, below which rounding noise decides."""
    short_error, _ = needle_in_near_uniform_keys(1024, kv_format, device)
    long_error, long_lse_error = needle_in_near_uniform_keys(131072, kv_format, device)
    tolerance = kernel_tolerance(kv_format, device)
    assert long_error <= max(1.5 * short_error, 0.1 * tolerance), f"{short_error:.2e} became {long_error:.2e}"
    assert long_lse_error < tolerance

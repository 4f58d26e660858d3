"""What each format costs: the error of the attention output against the *original* K and V, bounded from both sides.

A band that is too low would mean that the cache is not really quantised; one that is too high, that it is done badly.
"""

import numpy as np
import oracle
import pytest
import torch
from bridge import values_of_tensor
from comparison import relative_error

import pyquantattn

HEADS, GROUP, DIM, LENGTH = 8, 4, 128, 512
# Per cent, Gaussian K and V, head_dim 128, 512 keys: the promised bands.
BANDS = {"int8": (0.7, 1.3), "fp8_e4m3": (3.0, 4.5), "fp8_e5m2": (6.0, 9.0)}


def gaussian(seed=0):
    rng = np.random.default_rng(seed)
    k, v = (rng.normal(size=(3, LENGTH, HEADS, DIM)).astype(np.float32) for _ in range(2))
    return rng.normal(size=(3, HEADS * GROUP, DIM)).astype(np.float32), 0.7 * k, 2.5 * v


def output_error(kv_format, device, static=False, seed=0):
    """(error against the original K and V, error against the dequantised cache), of the attention output."""
    q, k, v = gaussian(seed)
    scales = {}
    if static:
        largest = oracle.FORMATS[kv_format].max_code
        scales = {"k_scale": float(np.abs(k).max()) / largest, "v_scale": float(np.abs(v).max()) / largest}
    cache = pyquantattn.KVCache.allocate(3, LENGTH, HEADS, DIM, kv_format=kv_format, device=device, **scales)
    flat_k, flat_v = (torch.from_numpy(x.reshape(-1, HEADS, DIM)).to(device) for x in (k, v))
    cache.append(flat_k, flat_v, torch.arange(3 * LENGTH, device=device))
    lens = np.array([LENGTH, LENGTH - 37, LENGTH // 2], np.int32)
    out = pyquantattn.decode_attention(
        torch.from_numpy(q).to(device), cache, seq_lens=torch.from_numpy(lens).to(device)
    )
    actual = values_of_tensor(out)
    stored_k, stored_v = (values_of_tensor(x) for x in cache.dequantize())
    original, _ = oracle.decode_attention(q[:, None].astype(np.float64), k.astype(np.float64), v, seq_lens=lens)
    dequantised, _ = oracle.decode_attention(q[:, None].astype(np.float64), stored_k, stored_v, seq_lens=lens)

    def relative(expected):
        return float(np.linalg.norm(actual - expected[:, 0]) / np.linalg.norm(expected))

    return relative(original), relative(dequantised)


@pytest.mark.parametrize("kv_format", BANDS)
def test_format_error_lies_in_its_band_and_kernel_error_below_a_thousandth(kv_format, device):
    total, kernel = output_error(kv_format, device)
    low, high = BANDS[kv_format]
    assert low <= 100 * total <= high, f"{kv_format}: {100 * total:.3f} %"
    assert kernel <= 1e-3, f"{kv_format}: kernel error {kernel:.2e}"


def test_d2_e5m2_is_twice_as_coarse_as_e4m3(device):
    """D2: one mantissa bit less doubles the error; swapped formats would show here."""
    ratio = output_error("fp8_e5m2", device)[0] / output_error("fp8_e4m3", device)[0]
    assert 1.8 <= ratio <= 2.2, ratio


@pytest.mark.parametrize("kv_format,largest", [("fp16", 5e-4), ("bf16", 4e-3)])
def test_sixteen_bit_formats_cost_their_rounding(kv_format, largest, device):
    """Unit roundoff 2^-11 and 2^-8 of K and V, averaged."""
    total, _ = output_error(kv_format, device)
    assert largest / 10 <= total <= largest, total


@pytest.mark.parametrize("kv_format,low,high", [("int8", 0.9, 2.0), ("fp8_e4m3", 3.0, 4.5), ("fp8_e5m2", 6.0, 9.0)])
def test_a_static_scale_costs_int8_resolution_and_fp8_nothing(kv_format, low, high, device):
    """One scale for the largest of all elements: int8 loses amax(all) / amax(vector), a float format does not."""
    total, kernel = output_error(kv_format, device, static=True)
    assert low <= 100 * total <= high and kernel <= 1e-3, f"{kv_format}: {100 * total:.3f} %, kernel {kernel:.2e}"


def test_mixed_pairs_lie_between_their_parts(device):
    errors = {pair: output_error(pair, device)[0] for pair in ("int8", "fp16/int8", "int8/fp8_e4m3", "fp8_e4m3")}
    assert errors["fp16/int8"] < errors["int8"] < errors["int8/fp8_e4m3"] < errors["fp8_e4m3"]


def test_d8_folding_scales_costs_nothing_beside_the_format(device):
    """D8: scales multiply scores and probabilities; against explicit dequantisation that costs a tenth of int8."""
    total, kernel = output_error("int8", device)
    assert kernel < 0.1 * total


@pytest.mark.parametrize("kv_format", ["int8", "fp8_e4m3", "fp8_e5m2"])
def test_outlier_channels_keep_the_kernel_exact(kv_format, device):
    """Real keys and queries have channels twenty times the others: the kernel's own error stays below a thousandth."""
    rng = np.random.default_rng(3)
    k, v = (rng.normal(size=(2, LENGTH, 4, DIM)).astype(np.float32) for _ in range(2))
    q = rng.normal(size=(2, 8, DIM)).astype(np.float32)
    k[..., 5] *= 20
    q[..., 77] *= 20
    v[..., 9] *= 20
    cache = pyquantattn.KVCache.allocate(2, LENGTH, 4, DIM, kv_format=kv_format, device=device)
    rows = (torch.from_numpy(x.reshape(-1, 4, DIM)).to(device) for x in (k, v))
    cache.append(*rows, torch.arange(2 * LENGTH, device=device))
    lens = np.array([LENGTH, 100], np.int32)
    out = pyquantattn.decode_attention(
        torch.from_numpy(q).to(device), cache, seq_lens=torch.from_numpy(lens).to(device)
    )
    stored = (values_of_tensor(x) for x in cache.dequantize())
    expected, _ = oracle.decode_attention(q[:, None].astype(np.float64), *stored, seq_lens=lens)
    error = relative_error(values_of_tensor(out), expected[:, 0])
    assert error <= 1e-3, f"{error:.2e}"


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kv_format,spike", [("int8", 30.0), ("fp8_e4m3", 100.0), ("fp8_e5m2", 10000.0)])
def test_a_huge_value_that_nobody_attends_to_costs_no_precision(kv_format, spike, static, device):
    """A token with a large V and a probability near zero (an attention sink has this shape reversed) beside others of
    ordinary size: each value counts with its own precision, not with that of the largest beside it."""
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, 256, 2, 64)).astype(np.float32)
    q = rng.normal(size=(1, 4, 64)).astype(np.float32)
    q[..., 0], k[..., 0] = 8, 0
    k[7, :, 0] = -60
    v[7] *= spike
    scales = {"k_scale": 1.0, "v_scale": 1.0} if static else {}
    cache = pyquantattn.KVCache.allocate(1, 256, 2, 64, kv_format=kv_format, device=device, **scales)
    cache.append(*(torch.from_numpy(x).to(device) for x in (k, v)), torch.arange(256, device=device))
    stored = (values_of_tensor(x) for x in cache.dequantize())
    lens = np.array([256], np.int32)
    expected, _ = oracle.decode_attention(q[:, None].astype(np.float64), *stored, seq_lens=lens)
    out = pyquantattn.decode_attention(
        torch.from_numpy(q).to(device), cache, seq_lens=torch.from_numpy(lens).to(device)
    )
    error = relative_error(values_of_tensor(out), expected[:, 0])
    assert error <= 1e-3, f"{error:.2e}"

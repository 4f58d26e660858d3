"""quantize_kv and dequantize_kv, bit by bit against the reference, on every backend."""

import numpy as np
import oracle
import pytest
import torch
from bridge import bits_of_tensor, codes_tensor, scale_tensor, tensor_of_bits, tensor_of_values, values_of_tensor
from cases import round_to
from comparison import assert_same_bits

import pyquantattn

EIGHT_BIT = ["int8", "fp8_e4m3", "fp8_e5m2"]
ALL_FORMATS = ["fp16", "bf16", *EIGHT_BIT]
FP16_PATTERNS = np.arange(65536, dtype=np.uint16)


def assert_quantizes_like_the_reference(x, dtype, kv_format, device, scale=None):
    """x [..., H, D] float64, exact in `dtype`. NaN codes of 16-bit formats may carry any payload."""
    fmt = oracle.FORMATS[kv_format]
    given = None if scale is None else torch.as_tensor(scale, dtype=torch.float32, device=device)
    codes, made_scale = pyquantattn.quantize_kv(tensor_of_values(x, dtype, device), kv_format, given)
    with np.errstate(over="ignore", invalid="ignore"):
        expected, expected_scale = oracle.quantize(x.astype(np.float32), fmt, scale)
    assert codes.dtype == getattr(torch, fmt.torch_dtype) and codes.shape == x.shape
    actual, expected = bits_of_tensor(codes), expected.view(np.dtype(f"u{fmt.code_bytes}"))
    if not fmt.has_scale:
        nan = np.isnan(x)
        assert np.isnan(values_of_tensor(codes)[nan]).all(), "NaN must stay NaN"
        actual, expected = np.where(nan, 0, actual), np.where(nan, 0, expected)
        assert made_scale is None
    assert_same_bits(actual, expected.astype(actual.dtype), f"{kv_format} codes of {dtype}")
    if fmt.has_scale and scale is None:
        assert made_scale.dtype == torch.float16 and made_scale.shape == x.shape[:-1]
        assert_same_bits(values_of_tensor(made_scale), expected_scale, f"{kv_format} scale of {dtype}")


def random_rows(shape, dtype, seed=0):
    """Vectors whose magnitudes span the range of float16, with spikes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * 10.0 ** rng.uniform(-6, 3.5, size=(*shape[:-1], 1))
    x[..., 3] *= 10
    return round_to(x, dtype)


@pytest.mark.parametrize("kv_format", ALL_FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [32, 40, 72, 128, 256])
def test_dynamic_quantisation_matches_the_reference_bit_by_bit(dtype, kv_format, head_dim, device):
    assert_quantizes_like_the_reference(random_rows((65, 3, head_dim), dtype), dtype, kv_format, device)


@pytest.mark.parametrize("kv_format", EIGHT_BIT)
@pytest.mark.parametrize("granularity", ["tensor", "head"])
def test_static_quantisation_matches_the_reference_and_saturates(kv_format, granularity, device):
    x = random_rows((33, 4, 64), "float32")
    per_head = np.array([0.013, 0.7, 2.5, 1e-3], np.float32)
    scale = per_head if granularity == "head" else per_head[0]
    assert_quantizes_like_the_reference(x, "float32", kv_format, device, scale)


@pytest.mark.parametrize("kv_format", EIGHT_BIT)
def test_d2_every_code_decodes_exactly(kv_format, device):
    """D2: all 256 codes, with a scale of one and with scales of their own."""
    fmt = oracle.FORMATS[kv_format]
    codes = np.arange(256, dtype=np.uint8).astype(fmt.code_dtype).reshape(2, 2, 64)
    for scale in (np.float32(1), np.array([0.37, 1.9], np.float32)):
        values = pyquantattn.dequantize_kv(
            codes_tensor(codes, fmt, "NHD", device), torch.as_tensor(scale, device=device)
        )
        with np.errstate(invalid="ignore"):
            expected = oracle.dequantize(codes, fmt, scale).astype(np.float32)
        np.testing.assert_array_equal(values_of_tensor(values.float()), expected)


@pytest.mark.parametrize("kv_format", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0])
def test_d1_d2_every_fp16_input_encodes_exactly(kv_format, scale, device):
    """D1, D2: all 65,536 fp16 inputs, infinities and NaN among them."""
    x = oracle.codecs.decode(FP16_PATTERNS, oracle.FORMATS["fp16"]).reshape(-1, 1, 64)
    assert_quantizes_like_the_reference(x, "float16", kv_format, device, np.float32(scale))


def test_every_fp16_input_encodes_to_int8_exactly(device):
    x = oracle.codecs.decode(FP16_PATTERNS, oracle.FORMATS["fp16"]).reshape(-1, 1, 64)
    assert_quantizes_like_the_reference(x, "float16", "int8", device, np.float32(0.5))


@pytest.mark.parametrize("kv_format", ["fp16", "bf16"])
def test_sixteen_bit_formats_keep_and_decode_every_pattern(kv_format, device):
    fmt = oracle.FORMATS[kv_format]
    patterns = FP16_PATTERNS.reshape(-1, 1, 64)
    values = pyquantattn.dequantize_kv(codes_tensor(patterns, fmt, "NHD", device), None)
    np.testing.assert_array_equal(
        values_of_tensor(values.float()), oracle.codecs.decode(patterns, fmt).astype(np.float32)
    )
    x = oracle.codecs.decode(patterns, fmt)
    assert_quantizes_like_the_reference(x, fmt.torch_dtype, kv_format, device)


@pytest.mark.parametrize("kv_format", ["fp16", "bf16"])
def test_sixteen_bit_formats_round_to_nearest_even(kv_format, device):
    fmt = oracle.FORMATS[kv_format]
    finite = oracle.codecs._tables(fmt.layout)[1]
    midpoints = ((finite[:-1] + finite[1:]) / 2).astype(np.float32).astype(np.float64)
    nudged = np.concatenate([midpoints, np.nextafter(midpoints.astype(np.float32), np.float32(0)).astype(np.float64)])
    x = np.concatenate([nudged, -nudged, [65519.0, 65520.0, 3.4e38, np.inf, -np.inf, np.nan]])
    x = np.resize(x, (-(-len(x) // 64), 1, 64))
    assert_quantizes_like_the_reference(x, "float32", kv_format, device)


@pytest.mark.parametrize("kv_format", ["fp8_e4m3", "fp8_e5m2"])
def test_d1_fp8_saturates_and_nan_stays_nan(kv_format, device):
    """D1: the inputs round the end of the range, by name."""
    largest = oracle.FORMATS[kv_format].max_code
    x = np.resize([447, 448, 463.9, 464, 465, 1e4, 57344, 61439, 61440, 65504, 1e30, np.inf], 64).reshape(1, 1, 64)
    x = np.concatenate([x, -x, np.full((1, 1, 64), np.nan)]).astype(np.float32).astype(np.float64)
    codes, _ = pyquantattn.quantize_kv(tensor_of_values(x, "float32", device), kv_format, torch.ones((), device=device))
    values = values_of_tensor(pyquantattn.dequantize_kv(codes, torch.ones((), device=device)).float())
    assert np.abs(values[:2]).max() == largest and np.isnan(values[2]).all()
    assert (values[1] == -values[0]).all()
    assert_quantizes_like_the_reference(x, "float32", kv_format, device, np.float32(1))


@pytest.mark.parametrize("kv_format", EIGHT_BIT)
def test_dynamic_scale_ignores_infinities_and_nan(kv_format, device):
    x = random_rows((4, 2, 64), "float32")
    x[0, 0, 5], x[1, 1, 0], x[2, 0, :] = np.inf, np.nan, -np.inf
    assert_quantizes_like_the_reference(x, "float32", kv_format, device)


@pytest.mark.parametrize("kv_format", EIGHT_BIT)
@pytest.mark.parametrize("amax", [0.0, 1e-45, 1e-38, 1e-30, 1e-8, 3e-6, 1.0, 65504.0, 1e9, 3e38])
@pytest.mark.parametrize("shape", ["constant", "spike"])
def test_d3_zero_constant_and_extreme_rows(kv_format, amax, shape, device):
    """D3: zero rows, constant rows, denormal and huge magnitudes: a finite scale, codes as defined."""
    x = np.zeros((2, 2, 64), np.float32)
    x[0] = np.float32(amax) if shape == "constant" else 0
    x[..., 7] = -np.float32(amax)
    assert_quantizes_like_the_reference(x.astype(np.float64), "float32", kv_format, device)
    codes, scale = pyquantattn.quantize_kv(torch.from_numpy(x).to(device), kv_format)
    values = values_of_tensor(pyquantattn.dequantize_kv(codes, scale).float())
    assert np.isfinite(values).all() and np.isfinite(values_of_tensor(scale)).all()
    if 1e-3 < amax < 65504.0:
        np.testing.assert_allclose(values[..., 7], x[..., 7], rtol=2e-3)  # float16 scale, rounded up: at most 2^-10


def test_d4_later_large_tokens_never_clip(device):
    """D4: a dynamic scale belongs to its token, so an earlier small one cannot clip a later large one."""
    x = np.ones((6, 1, 64), np.float32) * (10.0 ** np.arange(-3, 3))[:, None, None].astype(np.float32)
    codes, scale = pyquantattn.quantize_kv(torch.from_numpy(x).to(device), "int8")
    assert (bits_of_tensor(codes).view(np.int8) >= 126).all()
    np.testing.assert_allclose(values_of_tensor(pyquantattn.dequantize_kv(codes, scale).float()), x, rtol=1e-2)


def test_d5_int8_rounds_half_to_even_symmetrically(device):
    """D5: ties, the ends of the range, and quantize(-x) == -quantize(x)."""
    x = np.resize([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 128, 1e9, -1e9, 0.49999997], 64).astype(np.float32)
    one = torch.ones((), device=device)
    codes, _ = pyquantattn.quantize_kv(torch.from_numpy(x).reshape(1, 1, 64).to(device), "int8", one)
    assert codes.flatten()[:11].tolist() == [0, 2, 2, 0, -2, 126, 127, 127, 127, -127, 0]
    y = torch.from_numpy(random_rows((200, 2, 64), "float32").astype(np.float32)).to(device)
    positive, scale = pyquantattn.quantize_kv(y, "int8")
    negative, mirrored_scale = pyquantattn.quantize_kv(-y, "int8")
    assert torch.equal(positive, -negative) and torch.equal(scale, mirrored_scale)
    assert positive.min() >= -127


def test_int8_decodes_minus_128_of_foreign_data(device):
    codes = torch.full((1, 1, 64), -128, dtype=torch.int8, device=device)
    values = pyquantattn.dequantize_kv(codes, torch.tensor(0.5, device=device))
    assert (values == -64).all()


@pytest.mark.parametrize("shape", [(0, 2, 64), (5, 2, 64), (3, 4, 2, 64)])
def test_leading_axes_are_free(shape, device):
    assert_quantizes_like_the_reference(random_rows(shape, "float32"), "float32", "int8", device)


def test_quantize_reads_any_strides(device):
    wide = torch.from_numpy(random_rows((9, 3, 256), "float32").astype(np.float32)).to(device)
    view = wide.transpose(0, 1)[:, ::2, 64:128]
    codes, scale = pyquantattn.quantize_kv(view, "fp8_e4m3")
    expected_codes, expected_scale = pyquantattn.quantize_kv(view.contiguous(), "fp8_e4m3")
    assert_same_bits(bits_of_tensor(codes), bits_of_tensor(expected_codes), "codes")
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("kv_format", ["fp8_e4m3", "fp8_e5m2"])
def test_nan_codes_and_scales_round_trip_as_nan(kv_format, device):
    """Dequantising poison must show it: dequantize_kv is not the place to hide NaN."""
    codes = tensor_of_bits(np.full((1, 2, 64), 0x7F, np.uint8), oracle.FORMATS[kv_format].torch_dtype, device)
    scale = scale_tensor(np.array([[1.0, 2.0]]), "NHD", device)
    assert pyquantattn.dequantize_kv(codes, scale).isnan().all()

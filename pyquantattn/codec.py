"""Tensors to codes and back, bit-identical on every backend."""

import torch
from torch import Tensor

from pyquantattn import _core, ops
from pyquantattn.formats import kv_format as find_format
from pyquantattn.inference_only import refuse_gradients
from pyquantattn.scales import as_static_scale

# The kernels index [page, token, head, head_dim].
_MAX_DIMS = 4


def quantize_kv(
    x: Tensor, kv_format: str, scale: Tensor | float | None = None, offset: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Encodes keys or values.

    Args:
        x: ``[..., H, D]``, float32, float16 or bfloat16, D contiguous.
        kv_format: one format, for example ``"int8"`` or ``"fp8_e4m3"``.
        scale: None for one dynamic scale for each vector, rounded up so that nothing clips; a number or a float32
            tensor ``[]`` or ``[H]`` for a static scale, with which values saturate.
        offset: float32 ``[H, D]``, subtracted from ``x`` in float32 before it is encoded; None: zero.

    Returns:
        Codes of the shape of ``x``; the scale: float16 of that shape without D (dynamic), the given one as a tensor
        (static), None for 16-bit formats.

    Raises:
        ValueError: an argument breaks one of these rules.

    FP8 is the OCP format (Micikevicius et al., arXiv:2209.05433); int8 is symmetric, in [-127, 127].

    >>> codes, scale = quantize_kv(torch.full((1, 4), 2.0), "int8")
    >>> codes
    tensor([[127, 127, 127, 127]], dtype=torch.int8)
    """
    row = find_format(kv_format, "quantize_kv")
    _require_vectors("quantize_kv", "x", x)
    refuse_gradients("quantize_kv", x=x, offset=offset)
    codes = torch.empty(x.shape, dtype=row.dtype, device=x.device)
    scales = as_static_scale(scale, x.device, "quantize_kv: scale")
    if scales is None and row.has_scale:
        scales = torch.empty(x.shape[:-1], dtype=torch.float16, device=x.device)
    _quantize(_flat(x), _flat(codes), _flat_scales(scales), offset)
    return codes, scales


def dequantize_kv(
    codes: Tensor, scale: Tensor | float | None, dtype: torch.dtype = torch.float32, offset: Tensor | None = None
) -> Tensor:
    """Decodes keys or values: code * scale + offset.

    Args:
        codes: ``[..., H, D]``, in the dtype of a KV format, D contiguous.
        scale: as ``quantize_kv`` returned it.
        dtype: float32, float16 or bfloat16.
        offset: as ``quantize_kv`` was given it.

    Returns:
        The numbers, of the shape of ``codes``, contiguous.

    Raises:
        ValueError: an argument breaks one of these rules.

    >>> dequantize_kv(torch.tensor([[1, -2, 3, 0]], dtype=torch.int8), 0.5)
    tensor([[ 0.5000, -1.0000,  1.5000,  0.0000]])
    """
    _require_vectors("dequantize_kv", "codes", codes)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dequantize_kv: dtype must be float32, float16 or bfloat16, got {dtype}")
    values = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    scales = as_static_scale(scale, codes.device, "dequantize_kv: scale")
    _dequantize(_flat(codes), _flat_scales(scales), offset, _flat(values))
    return values


def _require_vectors(who: str, name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{who}: {name} must be a torch.Tensor, got {type(x).__name__}")
    if x.ndim < 2:
        raise ValueError(f"{who}: {name} must have shape [..., H, D], got {list(x.shape)}")


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, -_MAX_DIMS) if x.ndim > _MAX_DIMS else x


def _flat_scales(scales: Tensor | None) -> Tensor | None:
    return scales.flatten(0, 1 - _MAX_DIMS) if scales is not None and scales.ndim >= _MAX_DIMS else scales


def _quantize(x: Tensor, codes: Tensor, scale: Tensor | None, offset: Tensor | None) -> None:
    if torch.compiler.is_compiling():
        ops.quantize_kv(x, codes, scale, offset)
    else:
        _core.quantize_kv(x, codes, scale, offset)


def _dequantize(codes: Tensor, scale: Tensor | None, offset: Tensor | None, values: Tensor) -> None:
    if torch.compiler.is_compiling():
        ops.dequantize_kv(codes, scale, offset, values)
    else:
        _core.dequantize_kv(codes, scale, offset, values)

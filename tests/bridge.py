"""Carries problems to the package's tensors and results back, as bits: no cast of torch is involved."""

from __future__ import annotations

import numpy as np
import oracle
import torch
from cases import Problem
from comparison import assert_close, assert_close_absolute
from numpy.typing import NDArray
from oracle.codecs import Format, decode, encode

import pyquantattn

FORMAT_OF_DTYPE = {"float16": oracle.FORMATS["fp16"], "bfloat16": oracle.FORMATS["bf16"]}


def tensor_of_bits(bits: NDArray, dtype: str, device: str) -> torch.Tensor:
    signed = np.ascontiguousarray(bits).view(np.dtype(f"i{bits.dtype.itemsize}"))
    return torch.from_numpy(signed).view(getattr(torch, dtype)).to(device)


def bits_of_tensor(tensor: torch.Tensor) -> NDArray:
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return tensor.detach().cpu().contiguous().view(integer).numpy().view(np.dtype(f"u{tensor.element_size()}"))


def tensor_of_values(values: NDArray, dtype: str, device: str) -> torch.Tensor:
    """Rounds to nearest even, as the reference defines it."""
    if dtype == "float32":
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(device)
    codes = encode(np.asarray(values, np.float64), FORMAT_OF_DTYPE[dtype])
    return tensor_of_bits(codes.astype(np.uint16), dtype, device)


def values_of_tensor(tensor: torch.Tensor) -> NDArray[np.float64]:
    if tensor.dtype == torch.float32:
        return tensor.detach().cpu().numpy().astype(np.float64)
    return decode(bits_of_tensor(tensor), FORMAT_OF_DTYPE[str(tensor.dtype).removeprefix("torch.")])


def codes_tensor(codes: NDArray, fmt: Format, layout: str, device: str) -> torch.Tensor:
    """[page, token, head, D] bits as a tensor in the cache's layout."""
    ordered = codes if layout == "NHD" else codes.swapaxes(1, 2)
    return tensor_of_bits(ordered, fmt.torch_dtype, device)


def scale_tensor(scale: NDArray | None, layout: str, device: str) -> torch.Tensor | None:
    if scale is None:
        return None
    if scale.ndim < 2:
        return torch.tensor(np.asarray(scale, np.float32).tolist(), dtype=torch.float32, device=device)
    ordered = scale if layout == "NHD" else scale.swapaxes(1, 2)
    return tensor_of_values(ordered, "float16", device)


def make_cache(problem: Problem, device: str) -> pyquantattn.KVCache:
    k_format, v_format = oracle.split_pair(problem.case.kv_format)
    layout = problem.case.layout
    return pyquantattn.KVCache.from_tensors(
        codes_tensor(problem.k_codes, k_format, layout, device),
        codes_tensor(problem.v_codes, v_format, layout, device),
        k_scale=scale_tensor(problem.k_scale, layout, device),
        v_scale=scale_tensor(problem.v_scale, layout, device),
        layout=layout,
        k_offset=None if problem.k_offset is None else torch.from_numpy(problem.k_offset).to(device),
    )


def query_tensor(problem: Problem, device: str) -> torch.Tensor:
    """[B, Hq, D] for one query token, else [B, n, Hq, D]; [T, Hq, D] of a ragged batch."""
    q = problem.q[:, 0] if problem.q.ndim == 4 and problem.q.shape[1] == 1 else problem.q
    return tensor_of_values(q, problem.case.q_dtype, device)


def keywords(problem: Problem, device: str) -> dict:
    arrays = {"seq_lens": problem.seq_lens, **problem.options}
    return {
        name: torch.from_numpy(value).to(device) if isinstance(value, np.ndarray) else value
        for name, value in arrays.items()
    }


def decode_tensors(problem: Problem, device: str, **run_options) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the package and asserts that the backend of `device` is the one that ran."""
    out, lse = pyquantattn.decode_attention(
        query_tensor(problem, device),
        make_cache(problem, device),
        return_lse=True,
        **keywords(problem, device),
        **run_options,
    )
    assert_ran("decode_attention", device)
    return out, lse


def assert_ran(operation: str, device: str) -> None:
    """The latest call was this operation, on the backend that was asked for."""
    kernel = pyquantattn.last_kernel()
    assert kernel is not None and (kernel.operation, kernel.backend) == (operation, device), kernel


def decode_arrays(problem: Problem, device: str, **run_options) -> tuple[NDArray, NDArray]:
    """(out [B, n, Hq, D], lse [B, n, Hq]) in float64."""
    out, lse = decode_tensors(problem, device, **run_options)
    return values_of_tensor(out).reshape(problem.q.shape), values_of_tensor(lse).reshape(problem.q.shape[:3])


# Unit roundoff of the output: an exact result stored in its dtype is off by at most this fraction of itself.
OUTPUT_ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def kernel_tolerance(kv_format: str, device: str) -> float:
    """8-bit caches: the promised 1e-3. 16-bit caches on a CPU: float32 arithmetic throughout. A score of size 10 has
    about 10 * sqrt(D) * 2^-24 = 1e-5 of rounding, which is the relative error of its probability. GPUs multiply 16-bit
    caches in tensor cores whose operand P is rounded to the cache's dtype."""
    k_format, v_format = oracle.split_pair(kv_format)
    if k_format.has_scale or v_format.has_scale:
        return 1e-3
    if device == "cpu":
        return 1e-5
    return 4e-3 if kv_format == "bf16" else 5e-4


def check(problem: Problem, device: str, **run_options) -> None:
    """The package's result equals the reference: `out` in relative error, `lse` in absolute error."""
    result = decode_arrays(problem, device, **run_options)
    compare(problem, result, kernel_tolerance(problem.case.kv_format, device), run_options)


def compare(problem, result: tuple[NDArray, NDArray], kernel: float, run_options: dict) -> None:
    """Compares (out, lse) with what the problem expects."""
    (out, lse), (expected_out, expected_lse) = result, problem.expected()
    rounding = OUTPUT_ROUNDING[problem.case.q_dtype]
    what = f"{problem.case} {run_options} on {pyquantattn.last_kernel()}"
    assert_close(out, expected_out, relative=kernel, rounding=rounding, what=f"out of {what}")
    assert_close_absolute(lse, expected_lse, tolerance=kernel * 2, what=f"lse of {what}")

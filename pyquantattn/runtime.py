"""What this build contains, what this machine can run, and how a call runs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from pyquantattn import _core
from pyquantattn.devices import as_device


def get_num_threads() -> int:
    """CPU threads of a call: the number set here, else ``torch.get_num_threads()``.

    >>> get_num_threads() >= 1
    True
    """
    return _core.get_num_threads()


def set_num_threads(num_threads: int | None) -> None:
    """Sets the CPU threads of every call of this process; None follows ``torch.get_num_threads()`` again.

    Raises:
        ValueError: ``num_threads`` is neither None nor an integer of at least 1.

    >>> set_num_threads(2)
    >>> get_num_threads()
    2
    >>> set_num_threads(None)
    """
    if num_threads is not None and not _is_count(num_threads):
        raise ValueError(f"set_num_threads: num_threads must be None or an int of at least 1, got {num_threads!r}")
    _core.set_num_threads(num_threads or 0)


def _is_count(number: object, smallest: int = 1) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and smallest <= number < 2**31


class LastKernel(NamedTuple):
    """The kernel that an attention call ran."""

    backend: str  # "cpu" or "cuda"
    variant: str  # the instruction set or kernel family
    num_splits: int  # most parts that the KV axis of one sequence was cut into
    split_size: int  # tokens per part; 0 where the kernel decides on the device or cuts nothing
    operation: str  # "decode_attention", "prefill_attention" or "hybrid_attention"


def last_kernel() -> LastKernel | None:
    """The kernel that the latest attention call of this thread ran; None before the first.

    >>> from pyquantattn import KVCache, decode_attention
    >>> cache = KVCache.allocate(1, 16, 1, 64)
    >>> out = decode_attention(torch.randn(1, 1, 64), cache, seq_lens=torch.tensor([0], dtype=torch.int32))
    >>> last_kernel().backend, last_kernel().operation
    ('cpu', 'decode_attention')
    """
    row = _core.last_kernel()
    return None if row is None else LastKernel(*row)


def decode_variants() -> tuple[str, ...]:
    """Names of the decoding kernels that this machine can run, of every backend.

    >>> "scalar" in decode_variants()
    True
    """
    return _variants(_core.decode_kernels())


def prefill_variants() -> tuple[str, ...]:
    """Names of the kernels for fresh K and V that this machine can run, of every backend.

    A GPU of compute capability 9.0 has two: ``"hopper"``, which runs where it can read the tensors, and
    ``"tensor_cores"``, which runs on every GPU.

    >>> "scalar" in prefill_variants()
    True
    """
    return _variants(_core.prefill_kernels())


def _variants(kernels: list[tuple[str, str, str, int, int, int, bool]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(row[1] for row in kernels if row[6]))


@contextmanager
def force_kernel(variant: str) -> Iterator[None]:
    """Makes every attention call of the process run one kernel variant, for tests and measurements.

    A call that the variant cannot serve raises ``UnsupportedError``. ``hybrid_attention`` takes names of decoding
    kernels; ``"tensor_cores"`` keeps its prompts from the Hopper kernel, too. The environment variable
    ``QUANTATTN_CPU_ISA`` chooses the instruction set of every CPU operation of a process, encoding and appending
    included, and ``QUANTATTN_CUDA_KERNEL`` the kernel of every CUDA operation that has one of that name.

    Args:
        variant: one of ``decode_variants()`` or ``prefill_variants()``, for example ``"scalar"``.

    Raises:
        ValueError: this machine runs no kernel of that name.

    >>> with force_kernel("scalar"):
    ...     pass
    """
    known = tuple(dict.fromkeys(decode_variants() + prefill_variants()))
    if variant not in known:
        raise ValueError(f"force_kernel: variant must be one of {', '.join(known)}, got {variant!r}")
    previous = _core.forced_kernel()
    _core.set_forced_kernel(variant)
    try:
        yield
    finally:
        _core.set_forced_kernel(previous)


def available_backends() -> tuple[str, ...]:
    """Backends that this build contains and this process can use now.

    >>> "cpu" in available_backends()
    True
    """
    return tuple(name for name, _, num_devices, _ in _core.backends() if num_devices > 0)


def supports(
    kv_format: str | None,
    head_dim: int,
    *,
    operation: str = "decode_attention",
    num_q_heads: int = 1,
    num_kv_heads: int = 1,
    num_q_tokens: int = 1,
    q_dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
) -> bool:
    """Whether an attention operation has a kernel for a combination, in this build and on this machine.

    Every other keyword of the operation is served by every kernel.

    Args:
        kv_format: a format or pair, ``"int8"`` or ``"fp16/int8"``; an unknown one is not supported. None for
            ``prefill_attention``, whose K and V have the query's dtype.
        head_dim, num_q_heads, num_kv_heads: as in the operation.
        operation: ``"decode_attention"``, ``"prefill_attention"`` or ``"hybrid_attention"``.
        num_q_tokens: query tokens of a sequence.
        q_dtype: dtype of the query.
        device: where the tensors would be.

    Raises:
        ValueError: there is no such operation, or torch knows no such device.

    >>> supports("int8", 128, num_q_heads=32, num_kv_heads=8)
    True
    >>> supports("int8", 128, num_q_heads=6, num_kv_heads=4)
    False
    >>> supports(None, 128, operation="prefill_attention", num_q_tokens=4096)
    True
    """
    if operation not in list(_SUPPORTS):  # a list, since what came may have no hash
        raise ValueError(f"supports: operation must be one of {', '.join(_SUPPORTS)}, got {operation!r}")
    backend = as_device(device, "supports").type
    are_counts = all(_is_count(n) for n in (head_dim, num_q_heads, num_kv_heads)) and _is_count(num_q_tokens, 0)
    if backend not in ("cpu", "cuda") or not are_counts:
        return False
    if q_dtype not in (torch.float32, torch.float16, torch.bfloat16) or num_q_heads % num_kv_heads != 0:
        return False
    return _SUPPORTS[operation](backend, kv_format, head_dim, num_q_tokens, q_dtype)


def _supports_decode(backend: str, kv_format: object, head_dim: int, num_q_tokens: int, _: torch.dtype) -> bool:
    return isinstance(kv_format, str) and _core.supports_decode(backend, kv_format, head_dim, num_q_tokens)


def _supports_prefill(backend: str, kv_format: object, head_dim: int, _: int, q_dtype: torch.dtype) -> bool:
    return kv_format is None and _core.supports_prefill(backend, str(q_dtype).removeprefix("torch."), head_dim)


def _supports_hybrid(backend: str, kv_format: object, head_dim: int, _: int, __: torch.dtype) -> bool:
    return isinstance(kv_format, str) and _core.supports_hybrid(backend, kv_format, head_dim)


_SUPPORTS = {
    "decode_attention": _supports_decode,
    "prefill_attention": _supports_prefill,
    "hybrid_attention": _supports_hybrid,
}


# For tests of the path that a torch without the DLPack C exchange API takes.
if os.environ.get("PYQUANTATTN_TENSOR_ACCESS", "exchange_api") == "attributes":
    _core.set_exchange_api_enabled(False)

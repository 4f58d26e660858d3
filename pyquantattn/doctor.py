"""Says what was built and what this machine can run: ``python -m pyquantattn.doctor``."""

import platform
import sys
from collections.abc import Iterator

import torch

import pyquantattn
from pyquantattn import _core


def report() -> Iterator[str]:
    """The lines of the report.

    >>> next(report()).startswith("pyquantattn")
    True
    """
    yield f"pyquantattn {pyquantattn.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    yield f"machine: {platform.machine()}, {platform.system()}; {pyquantattn.get_num_threads()} CPU threads a call"
    access = "DLPack C exchange API" if _core.uses_exchange_api(torch.empty(0)) else "tensor attributes (slower)"
    yield f"tensors are read through: {access}"
    yield from _backends()
    yield from _operations()
    yield from _kernels("decoding", _core.decode_kernels())
    yield from _kernels("prefill", _core.prefill_kernels())
    if forced := _core.forced_kernel():
        yield f"forced by force_kernel: {forced}"


def _backends() -> Iterator[str]:
    built = _core.backends()
    yield "backends:"
    for name, _, num_devices, status in built:
        usable = f"{num_devices} usable device{'s' if num_devices != 1 else ''}" if num_devices else "not usable here"
        yield f"  {name}: {usable}; {status}"
    if not any(name == "cuda" for name, *_ in built):
        hint = "; this torch sees a CUDA device: rebuild with nvcc on the PATH" if torch.cuda.is_available() else ""
        yield f"  cuda: not in this build{hint}"


def _operations() -> Iterator[str]:
    yield "attention:"
    for backend in pyquantattn.available_backends():
        has = {
            "decode_attention": pyquantattn.supports("int8", 128, device=backend),
            "prefill_attention": pyquantattn.supports(None, 128, operation="prefill_attention", device=backend),
            "hybrid_attention": pyquantattn.supports("int8", 128, operation="hybrid_attention", device=backend),
        }
        yield f"  {backend}: {', '.join(name for name in has if has[name])}"


def _kernels(kind: str, kernels: list[tuple[str, str, str, int, int, int, bool]]) -> Iterator[str]:
    formats: dict[tuple[str, str, int, int, int, bool], list[str]] = {}
    for backend, variant, kv_format, low, high, multiple, runs_here in kernels:
        formats.setdefault((backend, variant, low, high, multiple, runs_here), []).append(kv_format)
    yield f"{kind} kernels:"
    for (backend, variant, low, high, multiple, runs_here), names in formats.items():
        state = "runs here" if runs_here else "not on this machine"
        yield f"  {backend} {variant} ({state}): head_dim {low} to {high} in steps of {multiple}; {', '.join(names)}"


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in report())

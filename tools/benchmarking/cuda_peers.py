"""Other libraries' decode attention on the same data: a function from a `Step` to a call, or None with a reason."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .cuda_shapes import DecodeShape


@dataclass
class Step:
    """One decode step in the shape that peers take. B batch_size, L kv_len (equal for all sequences).

    `order` [B, pages] int32 says which page of `paged(k)` is which of a sequence; peers without pages get 0, 1, 2, ...
    """

    q: torch.Tensor  # [B, Hq, D] float16
    k: torch.Tensor  # [B, L, Hkv, D], float16 or an FP8 dtype
    v: torch.Tensor
    page_size: int
    order: torch.Tensor

    def paged(self, tensor: torch.Tensor) -> torch.Tensor:
        """[num_pages, page_size, Hkv, D] view."""
        return tensor.view(-1, self.page_size, *tensor.shape[2:])

    def values(self, row: int) -> list[torch.Tensor]:
        """K and V of a sequence: [L, Hkv, D] float64."""
        return [self.paged(tensor)[self.order[row].long()].double().flatten(0, 1) for tensor in (self.k, self.v)]


Call = Callable[[], torch.Tensor]


def torch_sdpa(backend: str) -> Callable[[Step], Call]:
    """torch's fused attention over a contiguous 16-bit cache; backend is FLASH_ATTENTION or CUDNN_ATTENTION."""

    def make(step: Step) -> Call:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q = step.q[:, :, None]
        k, v = step.k.transpose(1, 2), step.v.transpose(1, 2)
        grouped = q.shape[1] != k.shape[1]

        def call() -> torch.Tensor:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)[:, :, 0]

        return call

    return make


_workspaces: dict[str, torch.Tensor] = {}


def workspace(name: str, num_bytes: int) -> torch.Tensor:
    """A zeroed buffer that all calls of one name share."""
    if name not in _workspaces:
        _workspaces[name] = torch.zeros(num_bytes, dtype=torch.uint8, device="cuda")
    return _workspaces[name]


def flashinfer_decode(use_tensor_cores: bool) -> Callable[[list[Step]], list[Call]]:
    """FlashInfer's paged decode; plan() runs here, on the host, and is not part of the timed call."""

    def make(steps: list[Step]) -> list[Call]:
        import flashinfer

        first = steps[0]
        batch, pages = first.order.shape
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace("flashinfer", 256 << 20), "NHD", use_tensor_cores=use_tensor_cores
        )
        wrapper.plan(
            torch.arange(0, batch * pages + 1, pages, dtype=torch.int32, device="cuda"),
            first.order.flatten(),
            torch.full((batch,), first.page_size, dtype=torch.int32, device="cuda"),
            first.q.shape[1],
            first.k.shape[2],
            first.q.shape[2],
            first.page_size,
            q_data_type=first.q.dtype,
            kv_data_type=first.k.dtype,
        )
        return [lambda step=step: wrapper.run(step.q, (step.paged(step.k), step.paged(step.v))) for step in steps]

    return make


def flashinfer_xqa(steps: list[Step]) -> list[Call]:
    """XQA's sm_90 kernel through FlashInfer, which casts the query and the probabilities to E4M3."""
    import flashinfer

    first = steps[0]
    batch, heads_q, head_dim = first.q.shape
    seq_lens = torch.full((batch, 1), first.k.shape[1], dtype=torch.uint32, device="cuda")
    semaphores = workspace("xqa_semaphores", 8 << 20).view(torch.uint32)
    scratch = workspace("xqa", 256 << 20)
    out = torch.empty(batch, 1, heads_q, head_dim, dtype=first.q.dtype, device="cuda")

    def call(step: Step) -> torch.Tensor:
        flashinfer.xqa(
            step.q[:, None],
            step.paged(step.k),
            step.paged(step.v),
            first.order,
            seq_lens,
            out,
            scratch,
            semaphores,
            step.k.shape[2],
            step.page_size,
        )
        return out[:, 0]

    return [lambda step=step: call(step) for step in steps]


@dataclass(frozen=True)
class Peer:
    """A peer kernel over one cache dtype."""

    name: str
    kv_dtype: torch.dtype
    make: Callable[[list[Step]], list[Call]]
    page_size: int = 16
    is_paged: bool = True


def _each(make: Callable[[Step], Call]) -> Callable[[list[Step]], list[Call]]:
    return lambda steps: [make(step) for step in steps]


_TORCH = [
    Peer("torch flash fp16", torch.float16, _each(torch_sdpa("FLASH_ATTENTION")), is_paged=False),
    Peer("torch cuDNN fp16", torch.float16, _each(torch_sdpa("CUDNN_ATTENTION")), is_paged=False),
]
_FLASHINFER = [
    Peer("FlashInfer fp16 cc", torch.float16, flashinfer_decode(False)),
    Peer("FlashInfer fp16 tc", torch.float16, flashinfer_decode(True)),
    Peer("FlashInfer e4m3 cc", torch.float8_e4m3fn, flashinfer_decode(False)),
    Peer("FlashInfer e4m3 tc", torch.float8_e4m3fn, flashinfer_decode(True)),
    Peer("XQA e4m3", torch.float8_e4m3fn, flashinfer_xqa, page_size=64),  # narrows query and probabilities to 8 bits
]
FLASHINFER_HEAD_DIM = 128  # it compiles a kernel for every other one, half a minute each
PEERS = ("torch", "flashinfer", "xqa")


@functools.cache
def flashinfer_failure() -> str | None:
    """Why FlashInfer cannot be used here; None: it can."""
    try:
        importlib.import_module("flashinfer")
    except Exception as error:
        return f"the package flashinfer cannot be imported: {error}"
    return None


def versions() -> dict[str, str]:
    """Of peers that may be here without being installed as a package."""
    if flashinfer_failure():
        return {}
    return {"flashinfer": getattr(importlib.import_module("flashinfer"), "__version__", "unknown")}


def missing(chosen: list[str]) -> dict[str, str]:
    """Chosen peers that cannot run here, and why."""
    failure = flashinfer_failure()
    if failure is None:
        return {}
    return {name: failure for name in ("flashinfer", "xqa", "fa3", "pod") if name in chosen}


def peers_for(shape: DecodeShape, chosen: list[str]) -> list[Peer]:
    """The chosen peers that are worth asking for a shape."""
    has_flashinfer = flashinfer_failure() is None and shape.head_dim == FLASHINFER_HEAD_DIM
    peers = [*_TORCH, *(_FLASHINFER if has_flashinfer else [])]
    return [
        peer
        for peer in peers
        if any(name in peer.name.lower() for name in chosen) and shape.kv_len % peer.page_size == 0
    ]

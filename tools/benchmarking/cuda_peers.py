"""Other libraries' decode attention on the same data: a function from a `Step` to a call, or None with a reason."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Step:
    """One decode step in the shape that peers take. B batch_size, L kv_len (equal for all sequences)."""

    q: torch.Tensor  # [B, Hq, D] float16
    k: torch.Tensor  # [B, L, Hkv, D], float16 or an FP8 dtype
    v: torch.Tensor
    page_size: int

    @property
    def pages_per_sequence(self) -> int:
        return self.k.shape[1] // self.page_size

    def paged(self, tensor: torch.Tensor) -> torch.Tensor:
        """[num_pages, page_size, Hkv, D] view: sequence b owns consecutive pages."""
        return tensor.view(-1, self.page_size, *tensor.shape[2:])


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


def _workspace(name: str, num_bytes: int) -> torch.Tensor:
    if name not in _workspaces:
        _workspaces[name] = torch.zeros(num_bytes, dtype=torch.uint8, device="cuda")
    return _workspaces[name]


def flashinfer_decode(use_tensor_cores: bool) -> Callable[[list[Step]], list[Call]]:
    """FlashInfer's paged decode; plan() runs here, on the host, and is not part of the timed call."""

    def make(steps: list[Step]) -> list[Call]:
        import flashinfer

        first = steps[0]
        batch, pages = first.q.shape[0], first.pages_per_sequence
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            _workspace("flashinfer", 256 << 20), "NHD", use_tensor_cores=use_tensor_cores
        )
        wrapper.plan(
            torch.arange(0, batch * pages + 1, pages, dtype=torch.int32, device="cuda"),
            torch.arange(batch * pages, dtype=torch.int32, device="cuda"),
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
    page_table = torch.arange(batch * first.pages_per_sequence, dtype=torch.int32, device="cuda").view(batch, -1)
    seq_lens = torch.full((batch, 1), first.k.shape[1], dtype=torch.uint32, device="cuda")
    semaphores = _workspace("xqa_semaphores", 8 << 20).view(torch.uint32)
    scratch = _workspace("xqa", 256 << 20)
    out = torch.empty(batch, 1, heads_q, head_dim, dtype=first.q.dtype, device="cuda")

    def call(step: Step) -> torch.Tensor:
        flashinfer.xqa(
            step.q[:, None],
            step.paged(step.k),
            step.paged(step.v),
            page_table,
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
    is_accurate: bool = True  # False: narrows the query or the probabilities to 8 bits


def _each(make: Callable[[Step], Call]) -> Callable[[list[Step]], list[Call]]:
    return lambda steps: [make(step) for step in steps]


def available_peers(names: list[str] | None = None) -> tuple[list[Peer], dict[str, str]]:
    """The peers that can run here, and why the others cannot."""
    peers = [
        Peer("torch flash fp16", torch.float16, _each(torch_sdpa("FLASH_ATTENTION"))),
        Peer("torch cuDNN fp16", torch.float16, _each(torch_sdpa("CUDNN_ATTENTION"))),
    ]
    missing = {}
    if importlib.util.find_spec("flashinfer") is None:
        missing["flashinfer"] = "flashinfer is not installed"
    else:
        for label, dtype in (("fp16", torch.float16), ("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
            peers.append(Peer(f"FlashInfer {label} cc", dtype, flashinfer_decode(False)))
            peers.append(Peer(f"FlashInfer {label} tc", dtype, flashinfer_decode(True)))
        peers.append(Peer("XQA e4m3", torch.float8_e4m3fn, flashinfer_xqa, page_size=64, is_accurate=False))
    if names is not None:
        peers = [peer for peer in peers if any(name.lower() in peer.name.lower() for name in names)]
    return peers, missing

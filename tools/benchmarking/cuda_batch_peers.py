"""Other libraries on prefill and hybrid batches of a CUDA device, the ways their users call them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .batch_contenders import BatchContender, BatchData, CachedBatch, FreshBatch, Part
from .batch_shapes import HybridShape, PrefillShape
from .cuda_peers import missing, workspace
from .filled_caches import FilledCaches

WORKSPACE_BYTES = 256 << 20
# FlashInfer compiles its kernels when they are first asked for, a minute or more for each head_dim.
FA2_HEAD_DIMS = {"fa2 fp16": (64, 128), "fa2 e4m3": (128,)}
FA3_HEAD_DIMS = {"fa3 fp16": (64, 128)}
POD_HEAD_DIMS = (128,)
KV_FORMATS = {"fp16": "fp16", "e4m3": "fp8_e4m3"}  # FlashInfer's names: ours
# flashinfer: its fa2 kernels, which serve every architecture; fa3: those of Hopper; pod: its kernel for mixed batches.
PEERS = {"prefill": ("torch", "flashinfer", "fa3"), "hybrid": ("flashinfer", "fa3", "pod")}


class TorchFused(FreshBatch):
    """scaled_dot_product_attention with one backend over prompts of equal lengths."""

    def __init__(self, data: BatchData, backend: str) -> None:
        super().__init__(data, torch.float16)
        self.name, self.backend = f"torch {backend} fp16", backend

    def call(self, copy: int) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        kernel = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}[self.backend]
        q, k, v = (self.data.by_sequence(x).transpose(1, 2) for x in self.copy(copy))
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=self.data.is_causal, enable_gqa=q.shape[1] != k.shape[1]
            )

    def output(self) -> Tensor:
        return self.call(0).transpose(1, 2).flatten(0, 1)


class TorchVarlen(FreshBatch):
    """varlen_attn, torch's flash kernel over ragged prompts."""

    name = "torch varlen fp16"

    def __init__(self, data: BatchData) -> None:
        super().__init__(data, torch.float16)
        self.cu_seqlens, self.longest = data.cu_seqlens_q, max(data.query_counts)

    def call(self, copy: int) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = self.copy(copy)
        grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}  # which torch 2.11 does not know
        return varlen_attn(
            q,
            k,
            v,
            self.cu_seqlens,
            self.cu_seqlens,
            self.longest,
            self.longest,
            window_size=(-1, 0 if self.data.is_causal else -1),
            **grouped,
        )

    def output(self) -> Tensor:
        return self.call(0)


class FlashInferFresh(FreshBatch):
    """BatchPrefillWithRaggedKVCacheWrapper; plan() runs here, on the host, and is not part of the timed call."""

    def __init__(self, data: BatchData, backend: str) -> None:
        import flashinfer

        super().__init__(data, torch.float16)
        self.name = f"FlashInfer {backend} fp16"
        self.wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
            workspace("flashinfer", WORKSPACE_BYTES), "NHD", backend=backend
        )
        self.wrapper.plan(
            data.cu_seqlens_q,
            data.cu_seqlens_k,
            data.q.shape[1],
            data.k.shape[1],
            data.q.shape[2],
            causal=data.is_causal,
            q_data_type=torch.float16,
            kv_data_type=torch.float16,
        )

    def call(self, copy: int) -> Tensor:
        return self.wrapper.run(*self.copy(copy), out=self.out)


def page_lists(filled: FilledCaches, sequences: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """FlashInfer's page table: where each sequence's pages begin, all pages, tokens on the last page of each."""
    assert filled.page_table is not None
    counts, device = [filled.page_counts[b] for b in sequences], filled.page_table.device
    begins = torch.tensor([0, *counts]).cumsum(0).to(device, torch.int32)
    pages = torch.cat([filled.page_table[b, :count] for b, count in zip(sequences, counts, strict=True)])
    last = [(filled.lengths[b] - 1) % filled.page_size + 1 for b in sequences]
    return begins, pages, torch.tensor(last, dtype=torch.int32, device=device)


class FlashInferPaged(CachedBatch):
    """BatchPrefillWithPagedKVCacheWrapper over the whole batch, decoding sequences included; 8-bit codes unscaled."""

    def __init__(self, data: BatchData, backend: str, kv_type: str) -> None:
        import flashinfer

        super().__init__(data, KV_FORMATS[kv_type], static_scales=None if kv_type == "fp16" else (1.0, 1.0))
        self.name = f"FlashInfer {backend} {kv_type} paged"
        self.wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            workspace("flashinfer", WORKSPACE_BYTES), "NHD", backend=backend
        )
        self.wrapper.plan(
            data.cu_seqlens_q,
            *page_lists(self.filled, range(len(data.kv_lens))),
            data.q.shape[1],
            data.k.shape[1],
            data.q.shape[2],
            self.filled.page_size,
            causal=data.is_causal,
            q_data_type=data.q.dtype,
            kv_data_type=self.filled.cache(0).k.dtype,
        )

    def call(self, copy: int) -> Tensor:
        cache = self.filled.cache(copy)
        return self.wrapper.run(self.data.q, (cache.k, cache.v), out=self.out)


class FlashInferPod(CachedBatch):
    """BatchPODWithPagedKVCacheWrapper (arXiv:2410.18038): one launch in which prefill and decode share the device."""

    def __init__(self, data: BatchData, prefill: Part, decode: Part) -> None:
        import flashinfer

        super().__init__(data, "fp16")
        self.name, self.prefill, self.decode = "FlashInfer pod fp16 paged", prefill, decode
        self.wrapper = flashinfer.BatchPODWithPagedKVCacheWrapper(workspace("flashinfer", WORKSPACE_BYTES), "NHD")
        tables: list[Tensor] = []
        for part in (prefill, decode):
            counts = [data.query_counts[b] for b in part.sequences]
            tables += [data.cumulated(counts), *page_lists(self.filled, part.sequences)]
        self.wrapper.plan(
            *tables,
            data.q.shape[1],
            data.k.shape[1],
            data.q.shape[2],
            self.filled.page_size,
            q_data_type=data.q.dtype,
            kv_data_type=data.q.dtype,
        )

    def call(self, copy: int) -> tuple[Tensor, Tensor]:
        cache = self.filled.cache(copy)
        kv = (cache.k, cache.v)
        return self.wrapper.run(self.prefill.q, kv, self.decode.q, kv, causal_p=True)

    def output(self) -> Tensor:
        for part, out in zip((self.prefill, self.decode), self.call(0), strict=True):
            self.out[part.rows] = out
        return self.out


def peers_of(
    data: BatchData, shape: PrefillShape | HybridShape, chosen: list[str]
) -> dict[str, Callable[[], BatchContender]]:
    """The chosen peers that are worth asking for a shape, by name, not yet built."""
    found: dict[str, Callable[[], Any]] = {}
    is_prefill = isinstance(shape, PrefillShape)
    if "torch" in chosen and is_prefill:
        fused = {f"torch {backend} fp16": partial(TorchFused, data, backend) for backend in ("flash", "cuDNN")}
        found |= {TorchVarlen.name: partial(TorchVarlen, data)} if shape.cv else fused
    if missing(["flashinfer"]):
        return found
    kernels = (FA2_HEAD_DIMS if "flashinfer" in chosen else {}) | (FA3_HEAD_DIMS if "fa3" in chosen else {})
    for backend, kv_type in (kernel.split() for kernel, dims in kernels.items() if shape.head_dim in dims):
        if is_prefill and kv_type == "fp16":
            found[f"FlashInfer {backend} fp16"] = partial(FlashInferFresh, data, backend)
        found[f"FlashInfer {backend} {kv_type} paged"] = partial(FlashInferPaged, data, backend, kv_type)
    if "pod" in chosen and not is_prefill and shape.head_dim in POD_HEAD_DIMS:
        prefill, decode = (Part.of(data, is_prefill=is_prefill) for is_prefill in (True, False))
        if prefill and decode:
            found["FlashInfer pod fp16 paged"] = partial(FlashInferPod, data, prefill, decode)
    return found

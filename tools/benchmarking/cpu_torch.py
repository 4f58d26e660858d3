"""torch's scaled_dot_product_attention as a contender, the ways its users call it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .batch_contenders import DTYPES, BatchData
from .cpu_contenders import StepData
from .cpu_timing import num_copies


class TorchSdpa:
    """K and V as [B, Hkv, L, D], the layout of Hugging Face's caches.

    `is_grouped` hands the query heads of a KV head over as query tokens, which is right for one decoded token (no mask)
    and reads each KV head once; otherwise the call says enable_gqa=True.
    """

    def __init__(self, data: StepData, dtype_name: str, is_grouped: bool) -> None:
        self.name = f"torch {dtype_name}" + (" grouped" if is_grouped else "")
        self.is_grouped = is_grouped
        self.out_shape = data.q.shape
        dtype = DTYPES[dtype_name]
        k, v = (x.transpose(1, 2).to(dtype).contiguous() for x in (data.k, data.v))
        self.cache_bytes = k.nbytes + v.nbytes
        self.copies = [(k, v)] + [(k.clone(), v.clone()) for _ in range(num_copies(self.cache_bytes) - 1)]
        q = data.q.to(dtype)
        self.q = q.unflatten(1, (data.shape.num_kv_heads, -1)) if is_grouped else q.unsqueeze(2)

    def call(self, copy: int) -> Tensor:
        k, v = self.copies[copy % len(self.copies)]
        return F.scaled_dot_product_attention(self.q, k, v, enable_gqa=not self.is_grouped)

    def output(self) -> Tensor:
        return self.call(0).reshape(self.out_shape)

    def dequantized(self, row: int) -> tuple[Tensor, Tensor]:
        k, v = self.copies[0]
        return k[row].transpose(0, 1).double(), v[row].transpose(0, 1).double()


class TorchPrefill:
    """Whole prompts of equal lengths: q [B, Hq, L, D], K and V [B, Hkv, L, D], as models call it."""

    def __init__(self, data: BatchData, dtype_name: str) -> None:
        self.name, self.is_causal = f"torch {dtype_name}", data.is_causal
        tensors = (data.by_sequence(x) for x in (data.q, data.k, data.v))
        self.q, self.k, self.v = (x.transpose(1, 2).to(DTYPES[dtype_name]).contiguous() for x in tensors)
        self.cache_bytes = self.k.nbytes + self.v.nbytes
        self.is_grouped = self.q.shape[1] != self.k.shape[1]

    def call(self, copy: int) -> Tensor:
        return F.scaled_dot_product_attention(
            self.q, self.k, self.v, is_causal=self.is_causal, enable_gqa=self.is_grouped
        )

    def output(self) -> Tensor:
        return self.call(0).transpose(1, 2).flatten(0, 1)

    def inputs(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (x[row].transpose(0, 1).double() for x in (self.q, self.k, self.v))
        return q, k, v

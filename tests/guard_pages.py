"""A program that runs every attention operation over tensors that lie against pages of no access.

python tests/guard_pages.py end avx2     faults where the avx2 kernels read or write behind a tensor; "start": before it
python tests/guard_pages.py end touch    faults, as proof that the pages do
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import sys

import torch

import pyquantattn
from pyquantattn import KVCache, decode_attention, hybrid_attention, prefill_attention

NO_ACCESS = 0
LENGTH, NUM_Q_HEADS, NUM_KV_HEADS = 70, 4, 2
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = ("fp16", "bf16", "int8", "fp8_e4m3", "fp8_e5m2")


class Guards:
    """Copies of tensors that end where a page of no access begins ("end"), or begin where one ends ("start")."""

    def __init__(self, side: str) -> None:
        self.side = side
        self.kept: list[mmap.mmap] = []

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        source = tensor.contiguous().flatten().view(torch.uint8)
        num_pages = max(1, -(-len(source) // mmap.PAGESIZE))
        memory = mmap.mmap(-1, (num_pages + 2) * mmap.PAGESIZE)
        self.kept.append(memory)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        for page in (0, num_pages + 1):
            address = ctypes.c_void_p(whole.data_ptr() + page * mmap.PAGESIZE)
            assert ctypes.CDLL(None).mprotect(address, mmap.PAGESIZE, NO_ACCESS) == 0
        begin = mmap.PAGESIZE if self.side == "start" else (num_pages + 1) * mmap.PAGESIZE - len(source)
        copy = whole[begin : begin + len(source)]
        copy.copy_(source)
        return copy.view(tensor.dtype).view(tensor.shape)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def run_prefill(guards: Guards, head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(LENGTH, heads, head_dim).to(dtype) for heads in (NUM_Q_HEADS, NUM_KV_HEADS, NUM_KV_HEADS))
    given = {
        "cu_seqlens_q": ints(0, 1, 1, LENGTH - 1, LENGTH),
        "alibi_slopes": torch.rand(4, NUM_Q_HEADS),
        "sinks": torch.randn(NUM_Q_HEADS),
        "seq_starts": ints(0, 0, 3, 0),
    }
    expected = prefill_attention(q, k, v, **given)
    tensors, given = [guards.copy(x) for x in (q, k, v)], {name: guards.copy(x) for name, x in given.items()}
    out = prefill_attention(*tensors, out=guards.copy(torch.empty_like(q)), **given)
    assert torch.equal(out, expected), f"prefill {head_dim} {dtype}"


def run_over_cache(guards: Guards, head_dim: int, dtype: torch.dtype, kv_format: str, page_size: int) -> None:
    """A step and a prompt over one cache: by hybrid_attention together, and a step of both by decode_attention."""
    num_pages = -(-LENGTH // page_size)
    offset = torch.randn(NUM_KV_HEADS, head_dim)
    cache = KVCache.allocate(num_pages, page_size, NUM_KV_HEADS, head_dim, kv_format, k_offset=offset)
    cache.append(*torch.randn(2, LENGTH, NUM_KV_HEADS, head_dim), torch.arange(LENGTH))
    codes = (cache.k, cache.v, cache.k_scale, cache.v_scale)
    guarded = KVCache.from_tensors(*(x if x is None else guards.copy(x) for x in codes), k_offset=guards.copy(offset))
    q = torch.randn(LENGTH, NUM_Q_HEADS, head_dim).to(dtype)
    table = torch.arange(num_pages, dtype=torch.int32)[None].repeat(2, 1)
    sequences = {"seq_lens": ints(LENGTH, LENGTH - 1), "page_table": table, "sinks": torch.randn(NUM_Q_HEADS)}
    batch = {**sequences, "cu_seqlens_q": ints(0, 1, LENGTH)}
    for attend, queries, given in ((hybrid_attention, q, batch), (decode_attention, q[:2], sequences)):
        expected = attend(queries, cache, **given)
        copies = {name: guards.copy(x) for name, x in given.items()}
        out = attend(guards.copy(queries), guarded, out=guards.copy(torch.empty_like(queries)), **copies)
        assert torch.equal(out, expected), f"{attend.__name__} {head_dim} {dtype} {kv_format} {page_size}"


def main(side: str, variant: str) -> None:
    faulthandler.enable()
    if variant == "touch":
        tensor = Guards(side).copy(torch.ones(3))
        ctypes.string_at(tensor.data_ptr() + (tensor.nbytes if side == "end" else -1), 1)
        return
    pyquantattn.set_num_threads(2)
    with pyquantattn.force_kernel(variant):
        for head_dim in (40, 64, 72, 128):
            for dtype in DTYPES:
                guards = Guards(side)
                run_prefill(guards, head_dim, dtype)
                for kv_format in FORMATS:
                    for page_size in (1, 7, LENGTH):
                        run_over_cache(guards, head_dim, dtype, kv_format, page_size)
    print("stayed inside")


if __name__ == "__main__":
    main(*sys.argv[1:])

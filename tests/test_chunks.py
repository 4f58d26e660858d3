"""A prompt that comes in chunks: the same results within the tolerance, the same cache bytes (F7), also after rollbacks
(F6) and while other sequences decode."""

import numpy as np
import oracle
import pytest
import torch
from bridge import OUTPUT_ROUNDING, kernel_tolerance, tensor_of_values, values_of_tensor
from cases import round_to
from comparison import assert_close, assert_close_absolute

from pyquantattn import KVCache, decode_attention, hybrid_attention, prefill_attention

FORMATS = ["fp16", "bf16", "int8", "fp8_e4m3", "fp8_e5m2", "fp16/int8"]
LENGTH, PAGE, HEADS, GROUP, DIM = 150, 16, 2, 3, 64


class Sequences:
    """Prompts over one cache that append and attend in steps of any sizes."""

    def __init__(self, lens, kv_format, device, page_size=PAGE, seed=0, dtype="float32", **options):
        rng = np.random.default_rng(seed)
        self.lens, self.device, self.options = lens, device, options
        shapes = (HEADS * GROUP, HEADS, HEADS)
        sizes = (1.3, 0.6, 1.7)
        # Sequence b of `data[i]`: every token's q, k or v.
        self.data = [
            [round_to(size * rng.normal(size=(n, heads, DIM)), dtype) for n in lens]
            for heads, size in zip(shapes, sizes, strict=True)
        ]
        self.dtype = dtype
        pages_each = -(-max(lens) // page_size)
        pages = rng.permutation(len(lens) * pages_each).reshape(len(lens), pages_each).astype(np.int32)
        self.page_size, self.pages = page_size, pages
        self.table = torch.from_numpy(pages).to(device)
        self.cache = KVCache.allocate(pages.size, page_size, HEADS, DIM, kv_format, device)
        self.done = [0] * len(lens)
        self.out = [np.full((n, HEADS * GROUP, DIM), np.nan) for n in lens]
        self.lse = [np.full((n, HEADS * GROUP), np.nan) for n in lens]

    def rows(self, which, counts):
        """The next `counts` tokens of each sequence."""
        parts = [
            self.data[which][b][done : done + n] for b, (done, n) in enumerate(zip(self.done, counts, strict=True))
        ]
        return tensor_of_values(np.concatenate(parts), self.dtype, self.device)

    def step(self, counts):
        """Appends the next tokens of each sequence and attends with them."""
        q, k, v = (self.rows(which, counts) for which in range(3))
        slots = []
        for b, (done, n) in enumerate(zip(self.done, counts, strict=True)):
            tokens = np.arange(done, done + n)
            slots.append(
                self.pages[b, tokens // self.page_size].astype(np.int64) * self.page_size + tokens % self.page_size
            )
        self.cache.append(k, v, torch.from_numpy(np.concatenate(slots)).to(self.device))
        ends = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32, device=self.device)
        lens = torch.tensor([d + n for d, n in zip(self.done, counts, strict=True)], dtype=torch.int32)
        out, lse = hybrid_attention(
            q, self.cache, cu_seqlens_q=ends, seq_lens=lens.to(self.device), page_table=self.table, return_lse=True,
            **self.options,
        )  # fmt: skip
        out, lse = values_of_tensor(out), values_of_tensor(lse)
        for b, n in enumerate(counts):
            first = int(ends[b])
            self.out[b][self.done[b] : self.done[b] + n] = out[first : first + n]
            self.lse[b][self.done[b] : self.done[b] + n] = lse[first : first + n]
            self.done[b] += n

    def run(self, chunk):
        """Every sequence to its end, `chunk` tokens at a time."""
        while self.done != list(self.lens):
            self.step([min(chunk, n - done) for n, done in zip(self.lens, self.done, strict=True)])
        return self

    def check(self):
        """Every row so far equals the reference over the bytes that the cache holds now."""
        k, v = (values_of_tensor(x) for x in self.cache.dequantize())
        q = np.concatenate(self.data[0])
        expected, expected_lse = oracle.hybrid_attention(
            q, k, v, cu_seqlens_q=np.array([0, *np.cumsum(self.lens)]), seq_lens=np.array(self.lens),
            page_table=self.pages, **self.options,
        )  # fmt: skip
        tolerance = kernel_tolerance(self.cache.kv_format, self.device)
        assert_close(np.concatenate(self.out), expected, relative=tolerance, rounding=OUTPUT_ROUNDING[self.dtype])
        assert_close_absolute(np.concatenate(self.lse), expected_lse, tolerance=2 * tolerance, what="lse")

    def cache_bytes(self):
        tensors = (self.cache.k, self.cache.v, self.cache.k_scale, self.cache.v_scale)
        return [t.view(torch.uint8) for t in tensors if t is not None]


def same_bytes(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.cache_bytes(), second.cache_bytes(), strict=True))


@pytest.mark.parametrize("options", [{}, {"sliding_window": 33, "logits_soft_cap": 5.0}], ids=["plain", "window_cap"])
@pytest.mark.parametrize("kv_format", FORMATS)
def test_f7_chunks_of_any_size_agree(kv_format, options, hybrid_device):
    """F7: chunks of 1, 7, 16, 64 tokens or the whole prompt: each within the tolerance of the truth, equal bytes."""
    lens = (LENGTH, 41, 64)
    whole = Sequences(lens, kv_format, hybrid_device, **options).run(max(lens))
    whole.check()
    for chunk in (1, 7, 16, 64):
        chunked = Sequences(lens, kv_format, hybrid_device, **options).run(chunk)
        chunked.check()
        assert same_bytes(chunked, whole), f"chunks of {chunk} leave other bytes"


@pytest.mark.parametrize("page_size", [1, 3, 64, 200])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_f7_chunks_over_any_page_size(dtype, page_size, hybrid_device):
    for chunk in (5, 31):
        Sequences((90, 17), "int8", hybrid_device, page_size=page_size, dtype=dtype).run(chunk).check()


def test_prompts_arrive_while_others_decode(hybrid_device):
    """Continuous batching: at any step some sequences prefill a chunk, some decode, some wait."""
    sequences = Sequences((60, 25, 150, 9), "fp8_e4m3", hybrid_device)
    sequences.step([40, 0, 0, 9])
    sequences.step([1, 20, 64, 0])
    sequences.step([1, 1, 64, 0])
    sequences.step([1, 0, 20, 0])
    for _ in range(2):
        sequences.step([1, 1, 1, 0])
    sequences.run(16).check()


def test_f6_a_rollback_leaves_no_stale_tokens(hybrid_device):
    """F6: 5 drafted tokens, of which 3 are taken back, then 2 others in their slots: as if the 5 had never been."""
    sequences, fresh = (Sequences((30,), "int8", hybrid_device) for _ in range(2))
    sequences.step([20])
    true_data = [[x.copy() for x in part] for part in sequences.data]
    for part in sequences.data:
        part[0][22:25] += 3.0  # drafts that will be rejected
    sequences.step([5])
    sequences.done[0], sequences.data = 22, true_data
    sequences.run(2)
    sequences.check()
    assert same_bytes(sequences, fresh.run(30))


@pytest.mark.parametrize("kv_format", ["fp16", "int8"])
def test_prefill_then_append_then_decode(kv_format, prefill_device):
    """The usual path: attention over fresh K and V, which then go into the cache for decoding."""
    sequences = Sequences((70, 33), kv_format, prefill_device, dtype="float16")
    prompts = [64, 20]
    q, k, v = (sequences.rows(which, prompts) for which in range(3))
    ends = torch.tensor([0, 64, 84], dtype=torch.int32, device=prefill_device)
    out = values_of_tensor(prefill_attention(q, k, v, cu_seqlens_q=ends))
    exact, _ = oracle.prefill_attention(*(values_of_tensor(x) for x in (q, k, v)), cu_seqlens_q=np.array([0, 64, 84]))
    assert_close(out, exact, relative=kernel_tolerance("fp16", prefill_device), rounding=OUTPUT_ROUNDING["float16"])
    whole = Sequences((70, 33), kv_format, prefill_device, dtype="float16").run(70)
    slots = [
        sequences.pages[b, np.arange(n) // PAGE].astype(np.int64) * PAGE + np.arange(n) % PAGE
        for b, n in enumerate(prompts)
    ]
    sequences.cache.append(k, v, torch.from_numpy(np.concatenate(slots)).to(prefill_device))
    sequences.done = list(prompts)
    q, k, v = (sequences.rows(which, [1, 1]) for which in range(3))
    slots = [sequences.pages[b, n // PAGE].astype(np.int64) * PAGE + n % PAGE for b, n in enumerate(prompts)]
    sequences.cache.append(k, v, torch.tensor(slots, device=prefill_device))
    lens = torch.tensor([65, 21], dtype=torch.int32, device=prefill_device)
    step = values_of_tensor(decode_attention(q, sequences.cache, seq_lens=lens, page_table=sequences.table))
    expected = np.stack([whole.out[0][64], whole.out[1][20]])
    tolerance = 2 * kernel_tolerance(kv_format, prefill_device)
    assert_close(step, expected, relative=tolerance, rounding=2 * OUTPUT_ROUNDING["float16"])

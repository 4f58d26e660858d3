"""A language model whose attention reads a quantised paged KV cache."""

from __future__ import annotations

import torch
from models.attention import causal_attention
from models.llama import Llama, LlamaConfig
from torch import Tensor

import pyquantattn as qa

PAGE_SIZE = 16


def has_prefill(q: Tensor) -> bool:
    """Whether prefill_attention has a kernel for such queries; where it has none, torch reads prompts."""
    return qa.supports(None, q.shape[-1], operation="prefill_attention", q_dtype=q.dtype, device=q.device)


class PagedCaches:
    """One KV cache per layer with a shared page table; sequence lengths are equal.

    Calling it is the model's attention for new tokens: it appends their K and V. Tokens that begin a text attend to
    each other's K and V as they are; later ones attend over the cache.
    """

    def __init__(self, config: LlamaConfig, kv_format: str, batch_size: int, max_len: int, device: str) -> None:
        pages = -(-max_len // PAGE_SIZE)
        order = torch.randperm(batch_size * pages, dtype=torch.int32, generator=torch.Generator().manual_seed(5))
        self.page_table = order.view(batch_size, pages).to(device)
        self.layers = [
            qa.KVCache.allocate(
                batch_size * pages,
                PAGE_SIZE,
                config.num_key_value_heads,
                config.head_dim,
                kv_format=kv_format,
                device=device,
            )
            for _ in range(config.num_hidden_layers)
        ]
        self.length = 0

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self.layers)

    @property
    def seq_lens(self) -> Tensor:
        return torch.full((len(self.page_table),), self.length, dtype=torch.int32, device=self.page_table.device)

    def append(self, layer: int, k: Tensor, v: Tensor, first: int) -> None:
        """Writes k, v [B, n, Hkv, D] at positions first .. first + n - 1 of every sequence."""
        positions = torch.arange(first, first + k.shape[1], device=k.device)
        slots = self.page_table[:, positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE
        self.layers[layer].append(k.flatten(0, 1), v.flatten(0, 1), slots.flatten())

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch_size, num_tokens = q.shape[:2]
        if layer == 0:
            self.length += num_tokens
        self.append(layer, k, v, self.length - num_tokens)
        if self.length > num_tokens:
            return qa.decode_attention(q, self.layers[layer], seq_lens=self.seq_lens, page_table=self.page_table)
        if not has_prefill(q):
            return causal_attention(layer, q, k, v)
        starts = torch.arange(batch_size + 1, dtype=torch.int32, device=q.device) * num_tokens
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        return qa.prefill_attention(q, k, v, cu_seqlens_q=starts).unflatten(0, (batch_size, num_tokens))


class Capture:
    """The model's attention over a whole text, keeping each layer's rotated q and k, and v: what caches are given."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor, Tensor]] = []  # per layer q [B, n, Hq, D], k and v [B, n, Hkv, D]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.layers.append((q, k, v))
        return causal_attention(layer, q, k, v)


def filled_caches(capture: Capture, config: LlamaConfig, kv_format: str, length: int, max_len: int) -> PagedCaches:
    """Caches that hold the captured K and V of positions 0 .. length - 1."""
    k = capture.layers[0][1]
    caches = PagedCaches(config, kv_format, k.shape[0], max_len, str(k.device))
    for layer, (_, keys, values) in enumerate(capture.layers):
        caches.append(layer, keys[:, :length], values[:, :length], 0)
    caches.length = length
    return caches


def step(model: Llama, tokens: Tensor, caches: PagedCaches) -> Tensor:
    """Logits [B, vocab_size] after one more token [B] per sequence, attention through the cache."""
    positions = torch.tensor([caches.length], device=tokens.device)
    return model(tokens[:, None], positions, caches)[:, 0]

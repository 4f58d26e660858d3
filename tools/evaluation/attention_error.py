"""How far attention over a quantised cache is from attention over the original K and V, codec and kernel apart.

    codec error   float64 attention over code * scale, against float64 attention over the original K and V
    kernel error  decode_attention, against float64 attention over code * scale

Both are the L2 distance of one output vector (a query of a head) relative to the norm of the expected one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from reference import attention_float64, stored_tokens
from torch import Tensor

import pyquantattn as qa

from .cached_model import PAGE_SIZE, Capture, PagedCaches

NUM_QUERIES = 16  # the most query tokens of one decode call


@dataclass(frozen=True)
class AttentionErrors:
    """Tensors [layer, length, sequence, query, head] on the CPU, for the context lengths given."""

    lengths: tuple[int, ...]
    codec: Tensor
    kernel: Tensor
    codec_lse: Tensor  # absolute, natural log
    kernel_lse: Tensor

    def summary(self) -> dict[str, float]:
        """Means and tails over everything; the kernel errors' maxima, since they must never be large."""
        return {
            "codec_error_mean": float(self.codec.mean()),
            "codec_error_p99": float(self.codec.flatten().quantile(0.99)),
            "codec_error_max": float(self.codec.max()),
            "kernel_error_mean": float(self.kernel.mean()),
            "kernel_error_max": float(self.kernel.max()),
            "codec_lse_error_mean": float(self.codec_lse.mean()),
            "codec_lse_error_max": float(self.codec_lse.max()),
            "kernel_lse_error_max": float(self.kernel_lse.max()),
        }


def original_attention(capture: Capture, lengths: tuple[int, ...]) -> list[list[list[tuple[Tensor, Tensor]]]]:
    """float64 outputs and LSEs over the original K and V, by [layer][length][sequence]; shared by all formats."""
    return [
        [
            [attention_float64(q[b, n - NUM_QUERIES : n], k[b, :n], v[b, :n]) for b in range(q.shape[0])]
            for n in lengths
        ]
        for q, k, v in capture.layers
    ]  # fmt: skip


def _relative(actual: Tensor, expected: Tensor) -> Tensor:
    return (actual.double() - expected).norm(dim=-1) / expected.norm(dim=-1)


def measure(
    capture: Capture, caches: PagedCaches, lengths: tuple[int, ...], original: list[list[list[tuple[Tensor, Tensor]]]]
) -> AttentionErrors:
    """Decodes the last NUM_QUERIES tokens of every context length over the filled caches of every layer."""
    batch_size = len(caches.page_table)
    found: dict[str, list[Tensor]] = {"codec": [], "kernel": [], "codec_lse": [], "kernel_lse": []}
    for layer, (q, _, _) in enumerate(capture.layers):
        cache = caches.layers[layer]
        for bucket, length in enumerate(lengths):
            seq_lens = torch.full((batch_size,), length, dtype=torch.int32, device=q.device)
            queries = q[:, length - NUM_QUERIES : length]
            out, lse = qa.decode_attention(
                queries, cache, seq_lens=seq_lens, page_table=caches.page_table, return_lse=True
            )
            for b in range(batch_size):
                pages = caches.page_table[b, : -(-length // PAGE_SIZE)].long()
                exact, exact_lse = attention_float64(queries[b], *stored_tokens(cache, pages, length))
                wanted, wanted_lse = original[layer][bucket][b]
                found["codec"].append(_relative(exact, wanted))
                found["kernel"].append(_relative(out[b], exact))
                found["codec_lse"].append((exact_lse - wanted_lse).abs())
                found["kernel_lse"].append((lse[b].double() - exact_lse).abs())
    shape = (len(capture.layers), len(lengths), batch_size)
    stacked = {name: torch.stack(errors).unflatten(0, shape).cpu() for name, errors in found.items()}
    return AttentionErrors(lengths, **stacked)

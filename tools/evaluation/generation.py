"""What a KV format does to a model's predictions: every token is decoded through the quantised cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from models.llama import Llama
from torch import Tensor

from .cached_model import PagedCaches, step


@dataclass(frozen=True)
class Predictions:
    """Teacher-forced decode against the model's own full-precision logits, over `count` predicted tokens."""

    count: int
    kl_mean: float  # nats, KL(full precision || cached)
    kl_standard_error: float
    kl_max: float
    same_top_1: float  # fraction of positions with the same most likely token
    bits_per_byte_change: float


def teacher_forced(model: Llama, tokens: Tensor, caches: PagedCaches, expected_logits: Tensor) -> Predictions:
    """Feeds tokens [B, n] one by one after what the caches hold; expected_logits [B, n, vocab_size] are exact."""
    logits = torch.stack([step(model, tokens[:, i], caches) for i in range(tokens.shape[1])], dim=1)
    log_p, log_q = expected_logits.double().log_softmax(-1), logits.double().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).flatten()
    targets = tokens[:, 1:, None]  # the last token's successor is not in the text
    change = (log_p[:, :-1].gather(-1, targets) - log_q[:, :-1].gather(-1, targets)).mean() / math.log(2)
    return Predictions(
        count=kl.numel(),
        kl_mean=float(kl.mean()),
        kl_standard_error=float(kl.std() / math.sqrt(kl.numel())),
        kl_max=float(kl.max()),
        same_top_1=float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()),
        bits_per_byte_change=float(change),
    )


def greedy(model: Llama, last_tokens: Tensor, caches: PagedCaches, count: int) -> Tensor:
    """[B, count] most likely continuations, each token fed back; last_tokens [B] are not in the cache yet."""
    tokens = [last_tokens]
    for _ in range(count):
        tokens.append(step(model, tokens[-1], caches).argmax(-1))
    return torch.stack(tokens[1:], dim=1)


def common_prefix(a: Tensor, b: Tensor) -> list[int]:
    """For each row of two [B, n] token tensors, how many first tokens agree."""
    return (a == b).long().cumprod(dim=1).sum(dim=1).tolist()

"""What a KV format does to a model's predictions and to the text it writes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from models.llama import Llama
from torch import Tensor

import pyquantattn as qa

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


@dataclass(frozen=True)
class Generation:
    """Greedy text after prompts, and how fast it came."""

    tokens: Tensor  # [B, count]
    prompt_tokens_per_second: float  # of all sequences together
    tokens_per_second: float
    agreement: float  # fraction of the tokens that full precision would have chosen after the same text


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Lets torch use `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def generate(model: Llama, prompts: Tensor, caches: PagedCaches, count: int) -> Generation:
    """Reads prompts [B, n] through prefill_attention into empty caches, then decodes `count` tokens over them."""
    batch_size, num_prompt_tokens = prompts.shape
    many_threads = qa.get_num_threads()
    start = time.perf_counter()
    with torch_threads(many_threads):
        tokens = [model(prompts, attend=caches)[:, -1].argmax(-1)]
    _wait(prompts.device)
    read = time.perf_counter()
    for _ in range(count - 1):
        tokens.append(step(model, tokens[-1], caches).argmax(-1))
    _wait(prompts.device)
    done = time.perf_counter()
    generated = torch.stack(tokens, dim=1)
    with torch_threads(many_threads):
        chosen = model(torch.cat((prompts, generated[:, :-1]), dim=1))[:, num_prompt_tokens - 1 :].argmax(-1)
    return Generation(
        generated,
        prompt_tokens_per_second=batch_size * num_prompt_tokens / (read - start),
        tokens_per_second=batch_size * (count - 1) / (done - read),
        agreement=float((chosen == generated).double().mean()),
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def common_prefix(a: Tensor, b: Tensor) -> list[int]:
    """For each row of two [B, n] token tensors, how many first tokens agree."""
    return (a == b).long().cumprod(dim=1).sum(dim=1).tolist()

"""The demo's text generation: the small real model, prompts by prefill_attention and append, then decode."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("safetensors", reason="the model is read by safetensors, an extra")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from evaluation.cached_model import PagedCaches
from evaluation.generation import common_prefix, generate
from models.corpus import held_out_texts
from models.llama import Llama

MODEL = Path(__file__).resolve().parents[1] / "tools" / "models" / "pybyte-8m"
NUM_PROMPT, NUM_GENERATED = 100, 24


class Forgetful(PagedCaches):
    """Loses the keys of the prompt."""

    def append(self, layer: int, k: Tensor, v: Tensor, first: int) -> None:
        super().append(layer, torch.zeros_like(k) if first == 0 else k, v, first)


@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama.load(MODEL)


@pytest.fixture(scope="module")
def prompts() -> Tensor:
    return torch.tensor([list(text) for _, text in held_out_texts(2, NUM_PROMPT)])


def test_text_over_an_fp16_cache_is_what_the_model_would_write(model: Llama, prompts: Tensor) -> None:
    """Greedy, against a loop without any cache."""
    with torch.inference_mode():
        tokens = prompts
        for _ in range(NUM_GENERATED):
            tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
        caches = PagedCaches(model.config, "fp16", 2, NUM_PROMPT + NUM_GENERATED, "cpu")
        written = generate(model, prompts, caches, NUM_GENERATED)
    assert written.tokens.tolist() == tokens[:, NUM_PROMPT:].tolist() and written.agreement == 1
    assert caches.length == NUM_PROMPT + NUM_GENERATED - 1  # the last token's K and V are nobody's yet
    assert written.prompt_tokens_per_second > 0 and written.tokens_per_second > 0


def test_agreement_tells_a_quantised_cache_from_one_that_lost_its_keys(model: Llama, prompts: Tensor) -> None:
    with torch.inference_mode():
        agreements = {
            kind: generate(
                model, prompts, kind(model.config, "int8", 2, NUM_PROMPT + NUM_GENERATED, "cpu"), NUM_GENERATED
            ).agreement
            for kind in (PagedCaches, Forgetful)
        }
    assert agreements[PagedCaches] > 0.9 > agreements[Forgetful]


def test_the_common_prefix_ends_at_the_first_other_token() -> None:
    a = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3]])
    b = torch.tensor([[1, 2, 3], [1, 5, 3], [4, 2, 3]])
    assert common_prefix(a, b) == [3, 1, 0]

"""A trained model on text that it has not seen: an int8 cache makes the tokens of a float16 cache."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers_models import hf

from pyquantattn.evaluation.metrics import agreement_before_ties
from pyquantattn.evaluation.model_level import first_divergence
from pyquantattn.evaluation.verdict import TIE_GAP
from pyquantattn.integrations.transformers import QuantizedCache, read_counts, reset_read_counts

ROOT = Path(__file__).parents[1]
PROMPT_LENGTH = 256


@pytest.fixture(scope="module")
def model() -> hf.PreTrainedModel:
    folder = ROOT / "tools" / "models" / "pybyte-8m"
    loaded = hf.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="pyquantattn"
    ).eval()
    loaded.generation_config.eos_token_id = None  # text goes on where a file would end
    return loaded


def held_out_prompts(count: int) -> torch.Tensor:
    sys.path.insert(0, str(ROOT))
    from tools.models.corpus import held_out_texts

    texts = held_out_texts(count, 2048 + PROMPT_LENGTH)
    # From the middle: the head of a file is its docstring.
    return torch.tensor([list(content[2048 : 2048 + PROMPT_LENGTH]) for _, content in texts])


def greedy(
    model: hf.PreTrainedModel, prompts: torch.Tensor, kv_format: str, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens [B, count], and the probability [B, count] by which each first choice led."""
    reset_read_counts()
    out = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        past_key_values=QuantizedCache(model.config, kv_format),
        max_new_tokens=count,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert read_counts().dequantized == 0
    assert read_counts().quantized == model.config.num_hidden_layers * (count - 1)
    best = torch.stack(out.logits, dim=1).double().softmax(-1).topk(2).values
    return out.sequences[:, PROMPT_LENGTH:], best[..., 0] - best[..., 1]


# The prompts are the running interpreter's library, so another version asks other things. Of 8 texts one (int8) or two
# (E4M3) may part at once, where two tokens are near each other; with a broken cache all of them do.
@pytest.mark.parametrize(
    ("num_prompts", "count", "least"),
    [
        (8, 64, {"int8": 0.87, "fp8_e4m3": 0.74}),
        pytest.param(32, 96, {"int8": 0.97, "fp8_e4m3": 0.8}, marks=pytest.mark.slow),
    ],
)
def test_greedy_tokens_agree_before_the_first_tie(
    model: hf.PreTrainedModel, num_prompts: int, count: int, least: dict[str, float]
) -> None:
    """docs/accuracy.md has the figures of the larger one: pytest --slow -s shows them."""
    prompts = held_out_prompts(num_prompts)
    expected, leads = greedy(model, prompts, "fp16", count)
    for kv_format, least_share in least.items():
        actual, _ = greedy(model, prompts, kv_format, count)
        places = [first_divergence(*pair) for pair in zip(expected.numpy(), actual.numpy(), strict=True)]
        gaps = [float(lead[place]) if place < count else None for lead, place in zip(leads, places, strict=True)]
        agreeing, counted = agreement_before_ties(places, gaps, count, TIE_GAP)
        parted = ", ".join(f"{place} ({gap:.4f})" for place, gap in zip(places, gaps, strict=True) if gap is not None)
        shown = f"{kv_format}: {agreeing} of {counted} tokens agree; texts part at (lead) {parted or 'no token'}"
        print(shown)
        assert counted >= num_prompts * count // 2, "ties must not hide most of the text"
        assert agreeing / counted >= least_share, shown

"""A trained model on text that it has not seen: an int8 cache makes the tokens of a float16 cache."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers_models import hf

from pyquantattn.integrations.transformers import QuantizedCache, read_counts, reset_read_counts

ROOT = Path(__file__).parents[1]
NUM_PROMPTS, PROMPT_LENGTH, NUM_NEW_TOKENS = 8, 256, 64
# A divergence is tie-like where the float16 cache itself gives its two best tokens log-probabilities this close (nats).
TIE = 0.05


@pytest.fixture(scope="module")
def model() -> hf.PreTrainedModel:
    folder = ROOT / "tools" / "models" / "pybyte-8m"
    loaded = hf.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="pyquantattn"
    ).eval()
    loaded.generation_config.eos_token_id = None  # text goes on where a file would end
    return loaded


@pytest.fixture(scope="module")
def prompts() -> torch.Tensor:
    sys.path.insert(0, str(ROOT))
    from tools.models.corpus import held_out_texts

    texts = held_out_texts(NUM_PROMPTS, 4096)
    # From the middle: the head of a file is its docstring.
    return torch.tensor([list(content[2048 : 2048 + PROMPT_LENGTH]) for _, content in texts])


def greedy(model: hf.PreTrainedModel, prompts: torch.Tensor, kv_format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens [B, n] and the log-probabilities [B, n, vocabulary] that they were chosen from."""
    out = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        past_key_values=QuantizedCache(model.config, kv_format),
        max_new_tokens=NUM_NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, PROMPT_LENGTH:], torch.stack(out.logits, dim=1).log_softmax(-1)


@pytest.fixture(scope="module")
def with_fp16(model: hf.PreTrainedModel, prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return greedy(model, prompts, "fp16")


# The prompts are the running interpreter's library, so another version asks other things. Of eight texts one (int8) or
# two (E4M3) may part at once, where two tokens are near each other; with a broken cache all of them do.
@pytest.mark.parametrize(("kv_format", "least"), [("int8", 0.87), ("fp8_e4m3", 0.74)])
def test_greedy_tokens_agree_before_the_first_tie(
    model: hf.PreTrainedModel,
    prompts: torch.Tensor,
    with_fp16: tuple[torch.Tensor, torch.Tensor],
    kv_format: str,
    least: float,
) -> None:
    expected, log_probabilities = with_fp16
    reset_read_counts()
    actual, _ = greedy(model, prompts, kv_format)
    assert read_counts().dequantized == 0
    assert read_counts().quantized == model.config.num_hidden_layers * (NUM_NEW_TOKENS - 1)

    num_agreeing = num_counted = 0
    for sequence in range(NUM_PROMPTS):
        wrong = (actual[sequence] != expected[sequence]).nonzero().flatten()
        first = int(wrong[0]) if len(wrong) else NUM_NEW_TOKENS
        num_agreeing += first
        best = log_probabilities[sequence, min(first, NUM_NEW_TOKENS - 1)].topk(2).values
        is_tie = first < NUM_NEW_TOKENS and float(best[0] - best[1]) < TIE
        # After a divergence the texts differ; one that is no tie counts as wrong to the end.
        num_counted += first if is_tie else NUM_NEW_TOKENS
    assert num_counted >= NUM_PROMPTS * NUM_NEW_TOKENS // 2, "ties must not hide most of the text"
    assert num_agreeing / num_counted >= least, f"{num_agreeing} of {num_counted} tokens"

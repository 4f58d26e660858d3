"""Many more families: a tiny random model of each makes the tokens of its own cache."""

from __future__ import annotations

import pytest
import torch
from transformers_families import FAMILIES, LEAST_RELEASE, MAMBA, OUTSIDE, random_model
from transformers_models import PROMPT_LENGTH, VOCABULARY, hf, left_padding, one_thread, relative_error, tokens

from pyquantattn import UnsupportedError
from pyquantattn.integrations.transformers import QuantizedCache, read_counts, reset_read_counts

pytest.importorskip("transformers", LEAST_RELEASE, reason=f"the families are those of transformers {LEAST_RELEASE}")

# The tokens of a float16 cache; the logits of some families are scaled, which scales their rounding errors.
LOGITS_ERROR = 1e-2


@one_thread()
def generate(model: hf.PreTrainedModel, cache: hf.Cache | None) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens and their logits, of padded prompts."""
    mask = left_padding()[:, :PROMPT_LENGTH]
    out = model.generate(
        tokens()[:, :PROMPT_LENGTH], attention_mask=mask, past_key_values=cache, max_new_tokens=12, do_sample=False,
        pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


@pytest.mark.slow
@pytest.mark.parametrize("max_cache_len", [None, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_are_those_of_the_familys_own_cache(family: str, max_cache_len: int | None) -> None:
    model = random_model(family)
    expected, expected_logits = generate(model, None)
    model.set_attn_implementation("pyquantattn" if family not in OUTSIDE else "eager")
    reset_read_counts()
    actual, logits = generate(model, QuantizedCache(model.config, "fp16", max_cache_len=max_cache_len))
    assert torch.equal(actual, expected) and relative_error(logits, expected_logits) < LOGITS_ERROR
    counts = read_counts()
    assert (counts.dequantized > 0) == (family in OUTSIDE) and (counts.quantized > 0) == (family not in OUTSIDE)


def test_a_model_without_a_cache_of_keys_and_values_is_refused() -> None:
    """Attention and a state in one layer: nothing would be quantised."""
    config = random_model("FalconH1", **{**MAMBA, "mamba_d_ssm": 128, "mamba_n_heads": 4}).config
    with pytest.raises(UnsupportedError, match="must have a layer that keeps K and V alone, got none in falcon_h1"):
        QuantizedCache(config)


def test_the_decoder_of_an_encoder_decoder_model_reads_codes() -> None:
    torch.manual_seed(0)
    sizes = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = hf.BartConfig(
        vocab_size=VOCABULARY, d_model=128, **sizes, encoder_ffn_dim=128, decoder_ffn_dim=128, pad_token_id=0,
        bos_token_id=1, decoder_start_token_id=1, eos_token_id=None, forced_eos_token_id=None, init_std=0.2,
    )  # fmt: skip
    model = hf.BartForConditionalGeneration(config).eval()
    expected, _ = generate(model, None)
    model.set_attn_implementation("pyquantattn")
    reset_read_counts()
    cache = hf.EncoderDecoderCache(QuantizedCache(model.config, "fp16"), hf.DynamicCache())
    assert torch.equal(generate(model, cache)[0], expected)
    assert read_counts().dequantized == 0 and read_counts().quantized == 2 * 11

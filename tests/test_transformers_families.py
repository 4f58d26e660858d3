"""More families than transformers_models has, one tiny random model of each: the tokens of their own cache.

Names are those of transformers' configuration classes.
"""

from __future__ import annotations

import pytest
import torch
from transformers_models import PROMPT_LENGTH, VOCABULARY, hf, left_padding, one_thread, relative_error, tokens

from pyquantattn import UnsupportedError
from pyquantattn.integrations.transformers import QuantizedCache, read_counts, reset_read_counts

# In earlier releases the hybrid families have caches of their own, and Nemotron its own attention.
pytest.importorskip("transformers", "5.23", reason="docs/transformers.md names these families for transformers 5.23")

_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.08,
}  # fmt: skip
_GPT = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256}
_WINDOW = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 2}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
_LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
ATTENTION = {
    "Cohere2": _WINDOW,
    "Exaone4": _WINDOW,
    "GPT2": _GPT,
    "GPTBigCode": _GPT,
    "GPTNeoX": {},
    "Gemma3Text": {**_WINDOW, "query_pre_attn_scalar": 32},
    "Glm4": {},
    "Granite": {},
    "Llama4Text": {"attention_chunk_size": 24, "intermediate_size_mlp": 128, **_EXPERTS},
    "Mixtral": _EXPERTS,
    "Nemotron": {},
    "OPT": {"ffn_dim": 128, "word_embed_proj_dim": 128},
    "Olmo2": {},
    "Phi": {},
    "Phi3": {},
    "Qwen3Moe": {**_EXPERTS, "moe_intermediate_size": 64},
    "SmolLM3": {},
    "StableLm": {},
    "Starcoder2": {"sliding_window": 24},
}
# Some of whose layers have a state instead of K and V, in a cache of transformers.
HYBRID = {
    "Bamba": {"attn_layer_indices": [1], **_MAMBA},
    "GraniteMoeHybrid": {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 64, **_EXPERTS, **_MAMBA},
    "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 8},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Qwen3Next": {
        "layer_types": ["linear_attention", "full_attention"], "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64, **_EXPERTS, **_LINEAR,
    },
}  # fmt: skip
# Which compute their own scores.
OUTSIDE = {"CodeGen": {**_GPT, "rotary_dim": 16}, "GPTJ": {**_GPT, "rotary_dim": 16}}
FAMILIES = ATTENTION | HYBRID | OUTSIDE
# The tokens of a float16 cache; the logits of some families are scaled, which scales their rounding errors.
LOGITS_ERROR = 1e-2


def random_model(family: str, options: dict[str, object]) -> hf.PreTrainedModel:
    name = family.removesuffix("Text")
    classes = [getattr(hf, f"{name}{end}", None) for end in ("ForCausalLM", "LMHeadModel")]
    chosen = next(found for found in classes if found is not None)
    torch.manual_seed(0)
    return chosen(getattr(hf, f"{family}Config")(**{**_COMMON, **options})).eval()


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
    model = random_model(family, FAMILIES[family])
    expected, expected_logits = generate(model, None)
    model.set_attn_implementation("pyquantattn" if family not in OUTSIDE else "eager")
    reset_read_counts()
    actual, logits = generate(model, QuantizedCache(model.config, "fp16", max_cache_len=max_cache_len))
    assert torch.equal(actual, expected) and relative_error(logits, expected_logits) < LOGITS_ERROR
    counts = read_counts()
    assert (counts.dequantized > 0) == (family in OUTSIDE) and (counts.quantized > 0) == (family not in OUTSIDE)


def test_a_model_without_a_cache_of_keys_and_values_is_refused() -> None:
    """Attention and a state in one layer: nothing would be quantised."""
    config = random_model("FalconH1", {"mamba_d_ssm": 128, **_MAMBA, "mamba_n_heads": 4}).config
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

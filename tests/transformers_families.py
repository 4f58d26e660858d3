"""Families beside those of transformers_models, named after their configuration classes, and random models of them.

In releases before LEAST_RELEASE the hybrid families have caches of their own, and Nemotron its own attention.
"""

from __future__ import annotations

import torch
from transformers_models import VOCABULARY, hf

LEAST_RELEASE = "5.23"
_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.08,
}  # fmt: skip
_GPT = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256}
_WINDOW = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 2}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
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
    "Bamba": {"attn_layer_indices": [1], **MAMBA},
    "GraniteMoeHybrid": {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 64, **_EXPERTS, **MAMBA},
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


def random_model(family: str, **changes: object) -> hf.PreTrainedModel:
    name = family.removesuffix("Text")
    classes = [getattr(hf, f"{name}{end}", None) for end in ("ForCausalLM", "LMHeadModel")]
    chosen = next(found for found in classes if found is not None)
    torch.manual_seed(0)
    return chosen(getattr(hf, f"{family}Config")(**{**_COMMON, **FAMILIES.get(family, {}), **changes})).eval()

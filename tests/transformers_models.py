"""Tiny random models of every family that the integration names, and ways to run them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", "5.3", "needs transformers 5.3 or newer: pip install '.[transformers]'"
)

import transformers as hf  # noqa: E402

from pyquantattn.integrations.transformers import QuantizedCache  # noqa: E402

hf.logging.set_verbosity_error()

VOCABULARY = 64
PROMPT_LENGTH = 40
SEQUENCE_LENGTH = 76
# Smaller than the prompt, so that every window has moved on when decoding begins.
WINDOW = 24

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
# Families that go through the attention interface.
INTERFACE_FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": WINDOW},
    "Gemma2": {"sliding_window": WINDOW, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 64},
    "GptOss": {
        "sliding_window": WINDOW,
        # Both experts always run: routing must not flip on a rounding error.
        "num_local_experts": 2,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}
# Families that compute their own scores, with ALiBi; six heads are no power of two.
ALIBI_FAMILIES = {
    "Bloom": {"vocab_size": VOCABULARY, "hidden_size": 192, "n_layer": 2, "n_head": 6},
    "Mpt": {"vocab_size": VOCABULARY, "d_model": 192, "n_layers": 2, "n_heads": 6, "max_seq_len": 256},
    "Falcon": {
        "vocab_size": VOCABULARY,
        "hidden_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "alibi": True,
        "new_decoder_architecture": False,
        "multi_query": True,
    },
}


@contextmanager
def one_thread() -> Iterator[None]:
    """Models this small only wait for their second thread."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def tiny_model(family: str, device: str = "cpu", **changes: object) -> hf.PreTrainedModel:
    """A random model of a family, in float32, with biases and sinks that are not zero: the same on every device."""
    torch.manual_seed(0)
    options = ALIBI_FAMILIES[family] if family in ALIBI_FAMILIES else {**_COMMON, **INTERFACE_FAMILIES[family]}
    config = getattr(hf, f"{family}Config")(**{**options, **changes})
    model = getattr(hf, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "sinks")):
                parameter.normal_(0.0, 0.5)
            elif family in ALIBI_FAMILIES and parameter.ndim == 2:
                parameter.mul_(3.0)  # their default initialisation gives attention that is uniform
    return model.to(device)


def tokens(num_sequences: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, VOCABULARY, (num_sequences, SEQUENCE_LENGTH), generator=generator)


def left_padding() -> torch.Tensor:
    """Sequences that begin at 13, 0 and 2."""
    mask = torch.ones(3, SEQUENCE_LENGTH, dtype=torch.long)
    mask[0, :13] = 0
    mask[2, :2] = 0
    return mask


@one_thread()
@torch.no_grad()
def teacher_forced(
    model: hf.PreTrainedModel,
    cache: hf.Cache,
    *,
    implementation: str | None = None,
    mask: torch.Tensor | None = None,
    step: int = 1,
    inputs: torch.Tensor | None = None,
    prompt_length: int = PROMPT_LENGTH,
) -> torch.Tensor:
    """Logits of every token that is not padding, a prompt first and then `step` tokens at a time."""
    if implementation is not None:
        model.set_attn_implementation(implementation)
    inputs = (tokens() if inputs is None else inputs).to(model.device)
    mask = None if mask is None else mask.to(model.device)
    bounds = [0, *range(prompt_length, inputs.shape[1], step), inputs.shape[1]]
    logits = []
    for begin, end in itertools.pairwise(bounds):
        seen = None if mask is None else mask[:, :end]
        out = model(inputs[:, begin:end], past_key_values=cache, attention_mask=seen, use_cache=True)
        logits.append(out.logits)
    joined = torch.cat(logits, dim=1)
    return joined if mask is None else joined[mask.bool()]


def expected_logits(model: hf.PreTrainedModel, *, step: int = 1, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Of the model's own attention, scores and all in plain torch, over a cache of float32."""
    return teacher_forced(model, hf.DynamicCache(config=model.config), implementation="eager", mask=mask, step=step)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(expected).all()
    return float((actual - expected).norm() / expected.norm())


CacheMaker = Callable[..., QuantizedCache]
CACHES: dict[str, CacheMaker] = {
    "growing": lambda config, kv_format: QuantizedCache(config, kv_format),
    "static": lambda config, kv_format: QuantizedCache(config, kv_format, max_cache_len=96),
    "cached prefill": lambda config, kv_format: QuantizedCache(config, kv_format, prefill="cached"),
    "centred": lambda config, kv_format: QuantizedCache(config, kv_format, k_offset="prompt"),
}

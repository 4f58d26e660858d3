"""Models of every family give the logits of their own attention, from a cache that is read in place."""

from __future__ import annotations

import pytest
import torch
from transformers_models import (
    ALIBI_FAMILIES,
    CACHES,
    INTERFACE_FAMILIES,
    WINDOW,
    expected_logits,
    hf,
    left_padding,
    relative_error,
    teacher_forced,
    tiny_model,
    tokens,
)

from pyquantattn import UnsupportedError, last_kernel
from pyquantattn.integrations.transformers import (
    QuantizedCache,
    alibi_models,
    attention,
    disable_alibi_kernel,
    enable_alibi_kernel,
    read_counts,
    reset_read_counts,
)

# A float16 cache rounds K and V by 2^-12 on average; two layers and their residual path pass that on to the logits.
FP16_ERROR = 1e-3
# Per-token int8 of Gaussian rows is off by 0.5 to 1 %; attention averages some of it, the residual path dilutes it.
INT8_ERROR = (5e-4, 2e-2)
MASKS = {"no padding": None, "left padding": left_padding()}


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("cache_kind", CACHES)
@pytest.mark.parametrize("family", INTERFACE_FAMILIES)
def test_logits_match_the_models_own_attention(family: str, cache_kind: str, padding: str, device: str) -> None:
    model, mask = tiny_model(family, device), MASKS[padding]
    expected = expected_logits(model, step=3, mask=mask)
    errors = {}
    for kv_format in ("fp16", "int8"):
        reset_read_counts()
        cache = CACHES[cache_kind](model.config, kv_format)
        actual = teacher_forced(model, cache, implementation="pyquantattn", mask=mask, step=3)
        errors[kv_format] = relative_error(actual, expected)
        counts = read_counts()
        assert counts.dequantized == 0, "every step must read the codes"
        num_layers, num_steps = 2, 12
        num_prefills = 0 if cache_kind == "cached prefill" else num_layers
        assert (counts.quantized, counts.exact) == (num_layers * (num_steps + 1) - num_prefills, num_prefills)
    assert errors["fp16"] < FP16_ERROR, errors
    assert INT8_ERROR[0] < errors["int8"] < INT8_ERROR[1], errors


@pytest.mark.parametrize("family", INTERFACE_FAMILIES)
def test_one_token_at_a_time(family: str, device: str) -> None:
    model, mask = tiny_model(family, device), left_padding()
    expected = expected_logits(model, step=1, mask=mask)
    actual = teacher_forced(model, QuantizedCache(model.config, "fp16"), implementation="pyquantattn", mask=mask)
    assert relative_error(actual, expected) < FP16_ERROR


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("cache_kind", CACHES)
@pytest.mark.parametrize("family", INTERFACE_FAMILIES)
def test_long_chunks_read_the_codes_in_one_call(
    family: str, cache_kind: str, padding: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More tokens at a time than decode_attention takes: by hybrid_attention, with the same logits as without it."""
    model, mask = tiny_model(family, device), MASKS[padding]
    expected = expected_logits(model, step=20, mask=mask)
    for backends, operation in (((device,), "hybrid_attention"), ((), "decode_attention")):
        monkeypatch.setattr(attention, "_HYBRID_BACKENDS", backends)
        reset_read_counts()
        cache = CACHES[cache_kind](model.config, "fp16")
        actual = teacher_forced(model, cache, implementation="pyquantattn", mask=mask, step=18)
        assert relative_error(actual, expected) < FP16_ERROR
        kernel = last_kernel()
        assert kernel is not None and (kernel.backend, kernel.operation) == (device, operation)
        assert read_counts().dequantized == 0 < read_counts().quantized


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("Mistral", {"sliding_window": 2 * WINDOW}),
        ("Gemma2", {"attn_logit_softcapping": None}),
        ("Gemma2", {"sliding_window": 2 * WINDOW}),
    ],
)
def test_every_feature_changes_the_logits(family: str, change: dict[str, object]) -> None:
    """The comparison above would see a window or cap that is ignored."""
    expected = expected_logits(tiny_model(family))
    without = expected_logits(tiny_model(family, **change))
    assert relative_error(without, expected) > 5 * FP16_ERROR


def test_sinks_and_padding_change_the_logits() -> None:
    model = tiny_model("GptOss")
    expected = expected_logits(model)
    padded = teacher_forced(model, hf.DynamicCache(config=model.config), mask=left_padding())
    unpadded = expected[left_padding().bool()]
    assert relative_error(unpadded, padded) > 5 * FP16_ERROR
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-1e4)
    assert relative_error(expected_logits(model), expected) > 5 * FP16_ERROR


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("cache_kind", ["growing", "static"])
@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_other_attention_functions_get_numbers(family: str, cache_kind: str, implementation: str, device: str) -> None:
    model, mask = tiny_model(family, device), left_padding()
    expected = expected_logits(model, step=3, mask=mask)
    reset_read_counts()
    cache = CACHES[cache_kind](model.config, "fp16")
    actual = teacher_forced(model, cache, implementation=implementation, mask=mask, step=3)
    assert relative_error(actual, expected) < FP16_ERROR
    assert read_counts().quantized == 0
    assert read_counts().dequantized > 0


def test_a_mask_that_is_no_span_is_honoured_by_dequantising(device: str) -> None:
    model = tiny_model("Llama", device)
    holes = torch.ones_like(tokens())
    holes[1, 5:9] = 0  # padding inside a sequence
    expected = expected_logits(model, step=3, mask=holes)
    reset_read_counts()
    actual = teacher_forced(
        model, QuantizedCache(model.config, "fp16"), implementation="pyquantattn", mask=holes, step=3
    )
    assert relative_error(actual, expected) < FP16_ERROR
    assert read_counts().dequantized > 0


def test_attention_weights_are_refused() -> None:
    model = tiny_model("Llama")
    model.set_attn_implementation("pyquantattn")
    attention = model.model.layers[0].self_attn
    from pyquantattn.integrations.transformers import quantized_attention

    heads = torch.zeros(1, 2, 1, 32)
    with pytest.raises(ValueError, match="output_attentions must be False, got True"):
        quantized_attention(attention, heads, heads, heads, None, output_attentions=True)


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("family", ALIBI_FAMILIES)
def test_alibi_models_read_codes_once_enabled(family: str, padding: str, device: str) -> None:
    model, mask = tiny_model(family, device), MASKS[padding]
    run = {"mask": mask, "step": 3}
    expected = teacher_forced(model, hf.DynamicCache(config=model.config), **run)

    reset_read_counts()
    unpatched = teacher_forced(model, QuantizedCache(model.config, "fp16"), **run)
    assert relative_error(unpatched, expected) < FP16_ERROR
    assert read_counts().quantized == 0 < read_counts().dequantized

    enable_alibi_kernel(model)
    reset_read_counts()
    errors = {
        kv_format: relative_error(teacher_forced(model, QuantizedCache(model.config, kv_format), **run), expected)
        for kv_format in ("fp16", "int8")
    }
    assert errors["fp16"] < FP16_ERROR, errors
    assert 2 * errors["fp16"] < errors["int8"] < INT8_ERROR[1], errors
    assert read_counts().dequantized == 0
    assert read_counts().quantized == 2 * 2 * 12  # formats, layers, steps

    disable_alibi_kernel(model)
    assert torch.equal(teacher_forced(model, hf.DynamicCache(config=model.config), **run), expected)


@pytest.mark.parametrize("family", ALIBI_FAMILIES)
def test_a_patch_that_changes_the_logits_is_refused(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    own = alibi_models._slopes_of
    monkeypatch.setattr(alibi_models, "_slopes_of", lambda bias: own(bias) * 1.1)
    expected = teacher_forced(model, hf.DynamicCache(config=model.config))
    with pytest.raises(UnsupportedError, match="logits of the changed model must be its own"):
        enable_alibi_kernel(model)
    assert torch.equal(teacher_forced(model, hf.DynamicCache(config=model.config)), expected)


def test_slopes_that_are_no_powers_of_two_are_taken() -> None:
    """Falcon rounds slope times position to bfloat16, the kernel does not: by far less than a wrong slope."""
    model = tiny_model("Falcon", hidden_size=384, num_attention_heads=12)
    enable_alibi_kernel(model)
    disable_alibi_kernel(model)


def test_alibi_patch_checks_its_model() -> None:
    with pytest.raises(ValueError, match="model must be one of bloom, mpt, falcon, with ALiBi, got llama"):
        enable_alibi_kernel(tiny_model("Llama"))
    with pytest.raises(ValueError, match="with ALiBi, got falcon"):
        enable_alibi_kernel(tiny_model("Falcon", alibi=False))
    model = tiny_model("Bloom")
    with pytest.raises(ValueError, match="must have been changed"):
        disable_alibi_kernel(model)
    enable_alibi_kernel(model)
    with pytest.raises(ValueError, match="must not be changed already"):
        enable_alibi_kernel(model)

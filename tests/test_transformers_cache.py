"""The cache by itself: formats, scales, memory, rings, rollback, and what it refuses."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers_models import (
    PROMPT_LENGTH,
    SEQUENCE_LENGTH,
    WINDOW,
    expected_logits,
    hf,
    relative_error,
    teacher_forced,
    tiny_model,
    tokens,
)

from pyquantattn import UnsupportedError
from pyquantattn.formats import KV_PAIRS
from pyquantattn.integrations.transformers import QuantizedCache, keep_edges, read_counts, reset_read_counts

NUM_HEADS, HEAD_DIM, NUM_LAYERS = 2, 32, 2
# Relative error of the logits that each format may cause: from the error of its codes, diluted by the residual path.
LARGEST_ERROR = {"fp16": 1e-3, "bf16": 5e-3, "int8": 2e-2, "fp8_e4m3": 6e-2, "fp8_e5m2": 1.2e-1}


def keys_and_values(num_tokens: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Of two sequences. Values are of another size than keys, so that their scales differ."""
    generator = torch.Generator().manual_seed(num_tokens)
    k, v = torch.randn(2, 2, NUM_HEADS, num_tokens, HEAD_DIM, generator=generator).to(device)
    return k, 3 * v


def config(family: str = "Llama", **changes: object) -> hf.PretrainedConfig:
    return tiny_model(family, **changes).config


@pytest.mark.parametrize("pair", KV_PAIRS)
def test_every_format_and_pair_decodes(pair: str, device: str) -> None:
    model = tiny_model("Llama", device)
    expected = expected_logits(model, step=3)
    reset_read_counts()
    error = relative_error(
        teacher_forced(model, QuantizedCache(model.config, pair), implementation="pyquantattn", step=3), expected
    )
    assert error < max(LARGEST_ERROR[name] for name in pair.split("/"))
    assert read_counts().dequantized == 0


@pytest.mark.parametrize("granularity", ["head", "tensor"])
@pytest.mark.parametrize("kv_format", ["int8", "fp8_e4m3", "fp16/int8"])
def test_static_scales_come_from_the_prompt_or_the_caller(kv_format: str, granularity: str, device: str) -> None:
    model = tiny_model("Llama", device)
    expected = expected_logits(model, step=3)
    cache = QuantizedCache(model.config, kv_format, scale_granularity=granularity)
    error = relative_error(teacher_forced(model, cache, implementation="pyquantattn", step=3), expected)
    # A scale for many tokens fits each of them less well.
    assert error < 2 * LARGEST_ERROR[kv_format.split("/")[-1]]
    scale = cache.layers[0].storage.cache.v_scale
    assert scale.shape == ((NUM_HEADS,) if granularity == "head" else ())

    v_scales = [layer.storage.cache.v_scale for layer in cache.layers]
    k_scales = [layer.storage.cache.k_scale for layer in cache.layers]
    options = {"v_scale": v_scales} if k_scales[0] is None else {"k_scale": k_scales, "v_scale": v_scales}
    given = QuantizedCache(model.config, kv_format, scale_granularity=granularity, **options)
    again = relative_error(teacher_forced(model, given, implementation="pyquantattn", step=3), expected)
    assert again == error


def with_key_bias(model: hf.PreTrainedModel, size: float) -> hf.PreTrainedModel:
    """The key projections of a Qwen2 get a bias in the slowest rotary channels, as large as in Qwen2.5."""
    for layer in model.model.layers:
        bias = torch.zeros(NUM_HEADS, HEAD_DIM)
        bias[:, [HEAD_DIM // 2 - 1, HEAD_DIM - 1]] = size
        layer.self_attn.k_proj.bias.data = bias.flatten()
    return model


@pytest.mark.parametrize("max_cache_len", [None, 96])
@pytest.mark.parametrize(("kv_format", "least_gain"), [("int8", 20), ("fp8_e4m3", 5), ("bf16", 5)])
def test_an_offset_from_the_prompt_rescues_a_model_with_a_key_bias(
    kv_format: str, least_gain: float, max_cache_len: int | None, device: str
) -> None:
    model = with_key_bias(tiny_model("Qwen2"), 100.0).to(device)
    expected = expected_logits(model, step=3)
    errors = {}
    for k_offset in (None, "prompt"):
        cache = QuantizedCache(model.config, kv_format, k_offset=k_offset, max_cache_len=max_cache_len)
        reset_read_counts()
        errors[k_offset] = relative_error(teacher_forced(model, cache, implementation="pyquantattn", step=3), expected)
        assert read_counts().dequantized == 0
    assert errors["prompt"] < LARGEST_ERROR[kv_format] and errors[None] > least_gain * errors["prompt"], errors


@pytest.mark.parametrize("max_cache_len", [None, 96])
@pytest.mark.parametrize(
    ("size", "options", "is_warned"),
    [
        (100.0, {}, True),
        (0.0, {}, False),
        (100.0, {"k_offset": "prompt"}, False),
        (100.0, {"kv_format": "fp16/int8"}, False),
        (100.0, {"kv_format": ["bf16", "fp8_e4m3"]}, True),
    ],
)
def test_keys_with_a_large_offset_are_warned_of(
    size: float, options: dict[str, object], is_warned: bool, max_cache_len: int | None, device: str
) -> None:
    """In the first step, before any token is decoded."""
    model = with_key_bias(tiny_model("Qwen2"), size).to(device)
    model.set_attn_implementation("pyquantattn")
    cache = QuantizedCache(model.config, max_cache_len=max_cache_len, **options)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        model(tokens()[:, :PROMPT_LENGTH].to(device), past_key_values=cache, use_cache=True)
    shown = [str(warning.message) for warning in caught if "QuantizedCache" in str(warning.message)]
    assert len(shown) == is_warned
    if is_warned:
        layers = "layer 1 share" if "kv_format" in options else "layer 0, layer 1 share"
        assert f"keys of {layers} offsets of up to" in shown[0] and 'k_offset="prompt"' in shown[0]


def test_offsets_come_from_the_prompt_or_the_caller() -> None:
    k, v = keys_and_values(50)
    cache = QuantizedCache(config(), k_offset=["prompt", None])
    for layer in cache.layers:
        layer.update(k + 100, v)
    first, second = (layer.storage.cache.k_offset for layer in cache.layers)
    assert second is None
    torch.testing.assert_close(first, (k + 100).mean((0, 2)), rtol=1e-6, atol=0)
    given = QuantizedCache(config(), k_offset=first)
    given.layers[0].update(k + 100, v)
    for ours, theirs in zip(given.layers[0].dequantize(), cache.layers[0].dequantize(), strict=True):
        assert torch.equal(ours, theirs)
    assert given.layers[0].storage.cache.k_offset is first
    short = QuantizedCache(config(), k_offset="prompt").layers[0]
    short.update(k[:, :, :15], v[:, :, :15])
    assert not short.storage.cache.k_offset.any()


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_the_offset_follows_growth_and_choice(family: str, device: str) -> None:
    """Keys keep their values when a cache grows, when sequences are chosen and when it moves."""
    layer = QuantizedCache(config(family), k_offset="prompt").layers[0]
    k, v = keys_and_values(200, device)
    layer.update(k[:, :, :70] + 100, v[:, :, :70])
    layer.update(k[:, :, 70:] + 100, v[:, :, 70:])
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.offload()
    layer.prefetch()
    stored = layer.dequantize()[0]
    expected = (k + 100)[[1, 0], :, -stored.shape[2] :]
    assert float((stored - expected).abs().max()) < 0.05


def test_layers_have_their_own_formats() -> None:
    deep = config(num_hidden_layers=4)
    assert QuantizedCache(deep, ["fp16", "int8", "fp8_e4m3", "bf16/int8"]).kv_formats[2] == "fp8_e4m3"
    assert QuantizedCache(deep, keep_edges("int8", 1, 1)).kv_formats == ["fp16", "int8", "int8", "fp16"]
    model = tiny_model("Llama")
    mixed = QuantizedCache(model.config, keep_edges("int8", first=1, last=0))
    error = relative_error(teacher_forced(model, mixed, implementation="pyquantattn"), expected_logits(model))
    assert error < LARGEST_ERROR["int8"]


def test_memory_is_that_of_the_codes() -> None:
    bytes_of_token = 2 * NUM_LAYERS * 3 * NUM_HEADS * (HEAD_DIM + 2)  # K and V, layers, sequences
    model = tiny_model("Llama")
    cache = QuantizedCache(model.config)
    assert cache.nbytes == 0
    teacher_forced(model, cache, implementation="pyquantattn")
    assert cache.nbytes_in_use == bytes_of_token * SEQUENCE_LENGTH
    assert cache.nbytes <= bytes_of_token * (SEQUENCE_LENGTH + 64 + SEQUENCE_LENGTH // 8)
    centred = QuantizedCache(model.config, k_offset="prompt")
    teacher_forced(model, centred, implementation="pyquantattn")
    assert centred.nbytes_in_use == cache.nbytes_in_use + NUM_LAYERS * NUM_HEADS * HEAD_DIM * 4
    fixed = QuantizedCache(model.config, max_cache_len=96)
    teacher_forced(model, fixed, implementation="pyquantattn")
    assert fixed.nbytes == fixed.nbytes_in_use == bytes_of_token * 96


@pytest.mark.parametrize("step", [1, 7, 64, 200])
def test_a_ring_keeps_its_window_and_no_more(step: int, device: str) -> None:
    """Positions far beyond the capacity, so that every page has been written over many times."""
    cache = QuantizedCache(config("Mistral"), "fp16")
    layer = cache.layers[0]
    k, v = keys_and_values(2000, device)
    layer.update(k[:, :, :300], v[:, :, :300])
    for begin in range(300, 2000, step):
        keys, values = layer.update(k[:, :, begin : begin + step], v[:, :, begin : begin + step])
    num_new = k[:, :, begin : begin + step].shape[2]
    visible = slice(2000 - num_new - WINDOW + 1, 2000)
    assert keys.shape[2] == num_new + WINDOW - 1
    assert torch.equal(keys.materialize(), k[:, :, visible].half().float())
    assert torch.equal(values.materialize(), v[:, :, visible].half().float())
    assert layer.storage.capacity <= WINDOW + max(step, 64) + 64
    assert layer.get_mask_sizes(3) == (WINDOW + 2, 2000 - WINDOW + 1)


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_rollback_leaves_no_trace(family: str, device: str) -> None:
    k, v = keys_and_values(120, device)
    straight, rolled = (QuantizedCache(config(family)).layers[0] for _ in range(2))
    straight.update(k[:, :, :100], v[:, :, :100])
    rolled.update(k[:, :, :90], v[:, :, :90])
    rolled.update(v[:, :, :17], k[:, :, :17])
    rolled.crop(-17)
    rolled.update(k[:, :, 90:100], v[:, :, 90:100])
    expected, actual = (layer.update(k[:, :, 100:], v[:, :, 100:]) for layer in (straight, rolled))
    assert rolled.get_seq_length() == 120
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours.materialize(), theirs.materialize())


def test_rollback_beyond_a_ring_is_an_error() -> None:
    layer = QuantizedCache(config("Mistral")).layers[0]
    layer.update(*keys_and_values(1000))
    with pytest.raises(ValueError, match=r"crop of layer 0 must leave a window of 24 tokens .* got a length of 500"):
        layer.crop(-500)


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
@pytest.mark.parametrize("kv_format", ["int8", "fp8_e5m2", "bf16"])
def test_sequences_can_be_chosen_repeated_and_moved(family: str, kv_format: str, device: str) -> None:
    layer = QuantizedCache(config(family), kv_format).layers[0]
    k, v = keys_and_values(200, device)
    layer.update(k, v)
    before = layer.dequantize()
    layer.batch_repeat_interleave(2)
    layer.reorder_cache(torch.tensor([3, 0, 2, 1]))
    layer.offload()
    layer.prefetch()
    layer.batch_select_indices(torch.tensor([0, 1, 3]))
    for now, then in zip(layer.dequantize(), before, strict=True):
        assert torch.equal(now, then[[1, 0, 0]])
    assert layer.batch_size == 3
    more = torch.cat([k, k[:1]])
    keys, _ = layer.update(more[:, :, :5], more[:, :, :5])
    assert keys.shape[0] == 3


def test_a_static_ring_serves_a_prompt_that_it_cannot_hold() -> None:
    layer = QuantizedCache(config("Mistral"), "fp16", max_cache_len=1000).layers[0]
    k, v = keys_and_values(700)
    keys, _ = layer.update(k, v)
    assert layer.storage.capacity < 200
    assert torch.equal(keys.materialize()[:, :, :700], k)
    with pytest.raises(ValueError, match="must bring at most max_step_tokens=64 new tokens, got 65"):
        layer.update(k[:, :, :65], v[:, :, :65])


def test_models_without_a_kernel_are_refused_before_anything_is_stored() -> None:
    model = tiny_model("Llama", head_dim=20)
    model.set_attn_implementation("pyquantattn")
    cache = QuantizedCache(model.config)
    with pytest.raises(UnsupportedError, match="layer 0 needs a decoding kernel for int8, head_dim 20"):
        model(tokens()[:, :PROMPT_LENGTH], past_key_values=cache, use_cache=True)
    assert cache.nbytes == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_format": "int3"}, "kv_format must be one of .* got 'int3'"),
        ({"kv_format": ["int8"]}, "a format for each of 2 layers, got 1"),
        ({"kv_format": None}, "kv_format must be a name, a list of names or a rule, got None"),
        ({"scale_granularity": "head", "k_scale": {0.1}}, "k_scale must be a scale or a list of scales, got {0.1}"),
        ({"prefill": "fast"}, 'prefill must be "exact" or "cached", got \'fast\''),
        ({"scale_granularity": "page"}, "scale_granularity must be one of token, head, tensor, got 'page'"),
        ({"k_scale": 0.1}, 'scale_granularity must be "head" or "tensor" where scales are given, got "token"'),
        ({"scale_granularity": "head", "k_scale": [0.1]}, "k_scale must have one scale for each of 2 layers, got 1"),
        ({"k_offset": "mean"}, "k_offset must be a tensor, \"prompt\", None or a list of those, got 'mean'"),
        ({"k_offset": 1.0}, 'k_offset must be a tensor, "prompt", None or a list of those, got 1.0'),
        ({"k_offset": [None, 1.0]}, r'k_offset must be a tensor, "prompt", None or a list of those, got \[None, 1.0\]'),
        ({"k_offset": [None]}, "k_offset must have one offset for each of 2 layers, got 1"),
        ({"max_cache_len": 0}, "max_cache_len must be an int of at least 1, got 0"),
        ({"max_cache_len": True}, "max_cache_len must be an int of at least 1, got True"),
        ({"max_step_tokens": 0}, "max_step_tokens must be an int of at least 1, got 0"),
    ],
)
def test_bad_arguments_say_the_rule_and_the_value(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizedCache(config(), **options)


def test_keep_edges_checks_its_arguments() -> None:
    with pytest.raises(ValueError, match="first must be an int of at least 0, got -1"):
        keep_edges("int8", -1, 0)
    with pytest.raises(ValueError, match="kv_format must be one of"):
        keep_edges("int8", 1, 1, edge_format="int2")


def test_a_prompt_longer_than_a_static_cache_is_an_error() -> None:
    model = tiny_model("Llama")
    model.set_attn_implementation("pyquantattn")
    with pytest.raises(ValueError, match="max_cache_len must be at least 40, got 30"):
        model(tokens()[:, :PROMPT_LENGTH], past_key_values=QuantizedCache(model.config, max_cache_len=30))

"""`generate` in every mode, with a float16 cache against transformers' own cache: the same tokens."""

from __future__ import annotations

import pytest
import torch
from transformers_models import PROMPT_LENGTH, hf, left_padding, one_thread, tiny_model, tokens

import pyquantattn
from pyquantattn import _core
from pyquantattn.integrations.transformers import QuantizedCache, read_counts, reset_read_counts

MODES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams with padding": {"num_beams": 2, "attention_mask": left_padding()[:, :PROMPT_LENGTH]},
    "left padding": {"attention_mask": left_padding()[:, :PROMPT_LENGTH]},
    "chunked prefill": {"prefill_chunk_size": 16},
}


@one_thread()
def generate(model: hf.PreTrainedModel, cache: hf.Cache, implementation: str, **options: object) -> torch.Tensor:
    model.set_attn_implementation(implementation)
    torch.manual_seed(5)
    settings = {"inputs": tokens()[:, :PROMPT_LENGTH], "do_sample": False, "max_new_tokens": 20, **options}
    for name, value in settings.items():
        settings[name] = value.to(model.device) if isinstance(value, torch.Tensor) else value
    return model.generate(past_key_values=cache, **settings)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_tokens_match_the_default_cache(family: str, mode: str, device: str) -> None:
    model = tiny_model(family, device)
    expected = generate(model, hf.DynamicCache(config=model.config), "sdpa", **MODES[mode])
    reset_read_counts()
    actual = generate(model, QuantizedCache(model.config, "fp16"), "pyquantattn", **MODES[mode])
    assert torch.equal(actual, expected)
    assert read_counts().dequantized == 0
    assert read_counts().quantized >= 2 * 19


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
@pytest.mark.parametrize("kind", ["assistant", "prompt lookup"])
def test_assisted_decoding_crops_the_cache(family: str, kind: str, device: str) -> None:
    model = tiny_model(family, device)
    help_options = {"prompt_lookup_num_tokens": 3} if kind == "prompt lookup" else {}
    if kind == "assistant":
        # Agrees sometimes, so that both accepted and rejected tokens occur.
        help_options["assistant_model"] = tiny_model(family, device, num_hidden_layers=1)
    inputs = tokens(1)[:, :7].repeat(1, 6)
    options = {"inputs": inputs, "eos_token_id": 0}  # prompt lookup of transformers 5.3 fails without an end token
    expected = generate(model, hf.DynamicCache(config=model.config), "sdpa", **options)
    reset_read_counts()
    actual = generate(model, QuantizedCache(model.config, "fp16"), "pyquantattn", **options, **help_options)
    assert torch.equal(actual, expected)
    assert read_counts().dequantized == 0


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_a_cache_is_reused_over_calls(family: str, device: str) -> None:
    model = tiny_model(family, device)

    def conversation(cache: hf.Cache, implementation: str) -> torch.Tensor:
        first = generate(model, cache, implementation)
        turn = torch.cat([first.cpu(), tokens()[:, PROMPT_LENGTH : PROMPT_LENGTH + 9]], dim=1)
        return generate(model, cache, implementation, inputs=turn)

    expected = conversation(hf.DynamicCache(config=model.config), "sdpa")
    cache = QuantizedCache(model.config, "fp16")
    assert torch.equal(conversation(cache, "pyquantattn"), expected)
    cache.reset()
    assert torch.equal(conversation(cache, "pyquantattn"), expected)


@pytest.mark.parametrize(
    ("family", "backend", "k_offset"),
    [
        ("Llama", "inductor", None), ("Mistral", "aot_eager", None), ("GptOss", "aot_eager", None),
        ("Gemma2", "aot_eager", "prompt"),
    ],
)  # fmt: skip
def test_a_static_cache_compiles_into_one_graph(
    family: str, backend: str, k_offset: str | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family, device)
    padding = {"attention_mask": left_padding()[:, :PROMPT_LENGTH]}
    expected = generate(model, hf.DynamicCache(config=model.config), "eager", **padding)

    calls = []
    run = _core.decode_attention
    monkeypatch.setattr(_core, "decode_attention", lambda *arguments: (calls.append(1), run(*arguments))[1])
    compiling = hf.CompileConfig(fullgraph=True, backend=backend, mode="default" if backend == "inductor" else None)
    compiling._compile_all_devices = True
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for _ in range(2):  # a new cache must not compile again
        reset_read_counts()
        cache = QuantizedCache(model.config, "fp16", max_cache_len=96, k_offset=k_offset)
        actual = generate(model, cache, "pyquantattn", compile_config=compiling, **padding)
        assert torch.equal(actual, expected)
        assert read_counts().quantized == 0, "the steps must have run compiled, where nothing is counted"
    assert len(calls) == 2 * 2 * 19  # runs, layers, steps
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("kv_format", ["fp16", "int8"])
def test_cuda_compiles_the_steps_of_a_static_cache_by_itself(kv_format: str, cuda: str) -> None:
    model = tiny_model("Llama", cuda)
    expected = generate(model, QuantizedCache(model.config, kv_format), "pyquantattn")
    torch.compiler.reset()
    for _ in range(2):
        reset_read_counts()
        actual = generate(model, QuantizedCache(model.config, kv_format, max_cache_len=96), "pyquantattn")
        assert torch.equal(actual, expected)
        assert read_counts().quantized == 0, "the steps must have run compiled, where nothing is counted"


def test_the_kernel_that_was_asked_for_ran() -> None:
    model = tiny_model("Llama")
    with pyquantattn.force_kernel("scalar"):
        generate(model, QuantizedCache(model.config), "pyquantattn", max_new_tokens=3)
        kernel = pyquantattn.last_kernel()
    assert kernel is not None
    assert (kernel.backend, kernel.variant) == ("cpu", "scalar")

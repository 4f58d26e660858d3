"""lm-evaluation-harness on a quantised cache: its scores are those of decoding token by token over the codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm_eval: pip install '.[lm-eval]'")
pytest.importorskip("accelerate", reason="needs accelerate: pip install '.[lm-eval]'")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers_models import ALIBI_FAMILIES, VOCABULARY, hf, one_thread, relative_error, teacher_forced, tiny_model

from pyquantattn.integrations.lm_eval import HFLM, QuantizedLM
from pyquantattn.integrations.transformers import QuantizedCache

ROOT = Path(__file__).parents[1]
CONTEXT = " ".join(f"w{7 * number % 50 + 4}" for number in range(30))


def tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(4, VOCABULARY))]
    whole = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=whole, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def language_model(family: str = "Llama", kind: type[HFLM] = QuantizedLM, **options: Any) -> HFLM:
    return kind(tiny_model(family), tokenizer=tokenizer(), batch_size=3, max_length=128, **options)


def loglikelihoods(model: HFLM, continuations: list[str]) -> list[float]:
    requests = [
        Instance("loglikelihood", {}, (CONTEXT, f" {text}"), number) for number, text in enumerate(continuations)
    ]
    with one_thread():
        return [value for value, _ in model.loglikelihood(requests, disable_tqdm=True)]


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2", "GptOss", *ALIBI_FAMILIES])
def test_forward_passes_are_those_of_decoding_over_the_codes(family: str) -> None:
    model = language_model(family, kv_format="fp8_e5m2")
    inputs = torch.tensor([model.tok_encode(CONTEXT)])
    with one_thread():
        actual = model._model_call(inputs)
    cache = QuantizedCache(model.model.config, "fp8_e5m2", prefill="cached")
    expected = teacher_forced(model.model, cache, inputs=inputs, prompt_length=1)
    exact = teacher_forced(tiny_model(family), hf.DynamicCache(config=model.model.config), inputs=inputs)
    assert relative_error(actual, expected) < 1e-4 < 0.01 < relative_error(expected, exact)


def test_likelihoods_show_the_cost_of_the_format() -> None:
    continuations = ["w9", "w10 w11", "w12 w13 w14 w15"]  # batches are padded
    exact = loglikelihoods(language_model(kind=HFLM), continuations)
    errors = {}
    for kv_format in ("fp16", "int8", "fp8_e5m2"):
        found = loglikelihoods(language_model(kv_format=kv_format), continuations)
        errors[kv_format] = max(abs(ours - theirs) for ours, theirs in zip(found, exact, strict=True))
    assert errors["fp16"] < 1e-3 < errors["int8"] < errors["fp8_e5m2"], errors


def test_generations_continue_from_the_cache() -> None:
    settings = {"until": ["</s>"], "max_gen_toks": 12, "do_sample": False}
    requests = [Instance("generate_until", {}, (text, settings), 0) for text in (CONTEXT, "w20 w21 w22")]
    with one_thread():
        texts = [
            model.generate_until(requests, disable_tqdm=True)
            for model in (language_model(kind=HFLM), language_model(kv_format="fp16"))
        ]
    assert texts[0] == texts[1] and len(texts[0][0].split()) == 12


def test_a_layer_that_reads_fresh_keys_is_an_error() -> None:
    model = language_model()
    model._new_cache = lambda: QuantizedCache(model.model.config, prefill="exact")
    with pytest.raises(RuntimeError, match="every layer must attend to its quantised cache"):
        loglikelihoods(model, ["w9"])


def test_a_task_is_scored_and_recorded() -> None:
    from datasets import Dataset

    rows = [{"text": CONTEXT, "choices": ["w9", "w10"], "gold": number % 2} for number in range(4)]
    task = {
        "task": "next_word",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "text",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
    }
    model = language_model(kv_format="fp16/int8", exact_first=1, k_offset="prompt")
    with one_thread():
        found = simple_evaluate(model, tasks=[task], bootstrap_iters=0, verbosity="ERROR")
    assert found["results"]["next_word"]["acc,none"] == 0.5
    assert found["config"]["kv_cache"]["kv_formats"] == ["fp16", "fp16/int8"]
    assert found["config"]["kv_cache"]["k_offset"] == "prompt"


def test_bad_arguments_say_so() -> None:
    with pytest.raises(ValueError, match="kv_format must be one of"):
        language_model(kv_format="int3")


@pytest.mark.slow
def test_the_command_takes_the_model_by_name(tmp_path: Path) -> None:
    tiny_model("Llama").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.json").write_text(json.dumps([{"text": CONTEXT, "gold": 1, "choices": ["w9", "w10"]}] * 3))
    (tmp_path / "words.yaml").write_text(
        "task: words\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.json}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: text\ndoc_to_choice: choices\ndoc_to_target: gold\n"
    )
    arguments = f"--model_args pretrained=model,kv_format=int8,exact_last=1 --tasks words --include_path {tmp_path}"
    command = f"-m pyquantattn.integrations.lm_eval run --model pyquantattn {arguments} --device cpu --output_path out"
    result = subprocess.run(
        [sys.executable, *command.split()], cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    (record,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(record.read_text())["config"]["kv_cache"]["kv_formats"] == ["int8", "fp16"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte is a token, as for the small models of this repository."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    whole = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in bytes_to_unicode().items()}, merges=[]))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    nul = bytes_to_unicode()[0]
    return PreTrainedTokenizerFast(tokenizer_object=whole, pad_token=nul, eos_token=nul)


def test_a_trained_model_with_a_key_bias_needs_its_offset() -> None:
    """Nats per byte of held-out source: int8 keys lose what the model knows, centred ones keep it."""
    sys.path.insert(0, str(ROOT))
    from tools.models.corpus import held_out_texts

    ((_, passage),) = held_out_texts(1, 1024)
    folder = ROOT / "tools" / "models" / "pybyte-key-bias"
    loss = {}
    for name, options in {"bf16": {}, "int8": {}, "int8 centred": {"k_offset": "prompt"}}.items():
        network = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = QuantizedLM(network, tokenizer=byte_tokenizer(), max_length=1024, kv_format=name.split()[0], **options)
        request = Instance("loglikelihood_rolling", {}, (passage.decode(),), 0)
        (value,) = model.loglikelihood_rolling([request], disable_tqdm=True)
        loss[name] = -value / len(passage)
    assert loss["bf16"] < 2.0 and loss["int8"] > loss["bf16"] + 0.02, loss
    assert abs(loss["int8 centred"] - loss["bf16"]) < 0.002, loss

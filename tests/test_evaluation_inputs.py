"""What the evaluation takes (dumped and synthetic tensors, Hugging Face folders, the built-in model) and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_language_model import TinyModel, one_thread

from pyquantattn.evaluation.command import main
from pyquantattn.evaluation.dumps import load_dump
from pyquantattn.evaluation.exact import exact_attention
from pyquantattn.evaluation.huggingface import HuggingFaceModel
from pyquantattn.evaluation.inputs import split_texts
from pyquantattn.evaluation.language_model import capture
from pyquantattn.evaluation.profiles import make_profile
from pyquantattn.evaluation.shifted_keys import ShiftedKeys

__all__ = ["one_thread"]  # a fixture that every test uses

for extra in ("matplotlib", "rich", "safetensors"):
    pytest.importorskip(extra, reason=f"the evaluation needs {extra}: pip install '.[test]'")

ROOT = Path(__file__).parents[1]
AMOUNTS = [
    *("--contexts", "32", "64", "--texts", "2", "--attention-texts", "1", "--uncached", "32"),
    *("--greedy-prompt", "20", "--greedy-tokens", "4", "--no-ablations"),
]


def tensors(length=64, num_queries=16):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(num_queries, 4, 64, generator=generator)
    k, v = (torch.randn(length, 2, 64, generator=generator) for _ in range(2))
    return {"q": q, "k": k, "v": v}


def write_npz(path, arrays):
    np.savez(path, **{name: np.asarray(value) for name, value in arrays.items()})
    return path


def results_of(folder):
    return json.loads((folder / "report.json").read_text())["results"]


def test_npz_and_safetensors_give_the_same_figures(tmp_path, device):
    from safetensors.torch import save_file

    npz = write_npz(tmp_path / "dump.npz", tensors())
    save_file(tensors(), tmp_path / "dump.safetensors")
    for path in (npz, tmp_path / "dump.safetensors"):
        assert main(["--tensors", str(path), "--device", device, "--out", str(tmp_path / path.suffix[1:])]) == 0
    found = [results_of(tmp_path / kind) for kind in ("npz", "safetensors")]
    for results in found:  # the layer is called after its file
        assert results["formats"]["int8"]["by_layer"].keys() == {"dump"}
    assert found[0] == found[1] and found[0]["controls_passed"]
    assert 0.005 < found[0]["formats"]["int8"]["attention"]["overall"]["output_error"]["mean"] < 0.015
    assert found[0]["noise_kl"] is None


def test_layers_come_in_the_order_of_their_numbers_with_their_options(tmp_path):
    arrays = {f"layers.{layer}.{name}": x for layer in (10, 2) for name, x in tensors().items()}
    options = {"sm_scale": 0.2, "sliding_window": 9, "logits_soft_cap": 5.0, "sinks": torch.ones(4)}
    arrays |= {f"layers.2.{name}": value for name, value in options.items()}
    arrays["layers.2.alibi_slopes"] = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    first, second = load_dump(write_npz(tmp_path / "dump.npz", arrays))
    assert (first.label, second.label) == ("layers.2", "layers.10") and second.options == {}
    assert first.first_query == 48 and first.options["sliding_window"] == 9 and first.options["sm_scale"] == 0.2
    plain, changed = (exact_attention(first.q, first.k, first.v, 48, o).out for o in ({}, first.options))
    assert (plain - changed).norm() > 0.1 * plain.norm()
    assert main(["--tensors", str(tmp_path / "dump.npz"), "--out", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"k": None}, "a dump must hold arrays named q, k and v"),
        ({"q": None}, "q is missing"),
        ({"q": torch.zeros(16, 3, 64)}, "q, k, v must be"),
        ({"q": torch.zeros(65, 4, 64)}, "with n <= L"),
        ({"v": torch.zeros(63, 2, 64)}, "q, k, v must be"),
        ({"v": torch.full((64, 2, 64), torch.nan)}, "v must be finite"),
        (tensors(15, 15), "k and v must hold at least 16 tokens, got 15"),
        ({"sm_scales": 0.2}, "each layer of a dump may hold q, k, v, sm_scale"),
        ({"7.q": torch.zeros(16, 4, 64)}, "got 7.q in"),
        ({"sinks": torch.ones(3)}, "sinks must be 4 numbers, one for each query head"),
        ({"logits_soft_cap": -3.0}, "logits_soft_cap must be one positive number, got [-3.0]"),
        ({"sliding_window": 0}, "sliding_window must be one positive number, got [0]"),
        ({"sliding_window": "all"}, "a dump must hold arrays of numbers"),
    ],
)
def test_bad_dumps_are_refused(tmp_path, capsys, change, rule):
    arrays = {name: x for name, x in (tensors() | change).items() if x is not None}
    path = write_npz(tmp_path / "dump.npz", arrays)
    assert main(["--tensors", str(path), "--out", str(tmp_path)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith("evaluate: ") and rule in shown
    assert not (tmp_path / "report.json").exists()


def test_other_files_are_refused(tmp_path, capsys):
    for name in ("bad.npz", "bad.safetensors"):
        (tmp_path / name).write_text("no arrays")
    rules = {
        "dump.pt": "must be a .npz or .safetensors file",
        "no.npz": "No such file",
        "bad.npz": "must hold arrays of numbers",
        "bad.safetensors": "must hold arrays of numbers",
    }
    for path, rule in ((tmp_path / name, rule) for name, rule in rules.items()):
        assert main(["--tensors", str(path), "--out", str(tmp_path)]) == 1
        assert rule in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "folder"],
        ["--text", "file"],
        ["--profiles", "--tensors", "dump.npz"],
        ["--profiles", "smooth"],
        ["--reference", "int8"],
        ["--profiles", "--needles", "1"],
        ["--tensors", "dump.npz", "--shift-keys", "60"],
        ["--shift-keys", "nan"],
    ],
)
def test_arguments_that_contradict_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and "error:" in capsys.readouterr().err


def test_without_a_source_tree_there_is_no_built_in_model(tmp_path, capsys):
    assert main(["--out", str(tmp_path)]) == 1
    assert "must be given, got none" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("rule", ["2=fp16", "-3=fp16", "1..0=fp16", "0..2=fp16"])
def test_rules_for_layers_that_are_not_there_are_refused(tmp_path, capsys, rule):
    arrays = {f"{layer}.{name}": x for layer in (0, 1) for name, x in tensors().items()}
    path = write_npz(tmp_path / "dump.npz", arrays)
    assert main(["--tensors", str(path), "--formats", f"int8+{rule}", "--out", str(tmp_path)]) == 1
    assert "must name layers from 0 to 1, or from -2 to -1 (the last)" in " ".join(capsys.readouterr().out.split())


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    path = write_npz(tmp_path / "dump.npz", tensors())
    assert main(["--tensors", str(path), "--out", str(path)]) == 1
    assert "dump.npz/parts" in (shown := capsys.readouterr().out) and "Not a directory" in " ".join(shown.split())


def test_profiles_are_repeatable_and_differ():
    first, again, other = (
        make_profile("key_bias", 64),
        make_profile("key_bias", 64),
        make_profile("key_bias", 64, seed=1),
    )
    assert torch.equal(first.k, again.k) and torch.equal(first.q, again.q) and not torch.equal(first.k, other.k)
    with pytest.raises(ValueError, match=r"^evaluate: profile must be one of gaussian, .* got 'smooth'"):
        make_profile("smooth")


def test_a_fragile_profile_is_warned_of_before_the_tables(tmp_path, capsys):
    assert main(["--profiles", "gaussian", "key_bias", "--contexts", "256", "--out", str(tmp_path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "warning K of layer key_bias: offsets of" in shown and "keep this in 16 bits" in shown
    assert "of layer gaussian" not in shown and shown.index("warning") < shown.index("Attention output error")
    words = {label: part["word"] for label, part in results_of(tmp_path)["formats"]["int8"]["by_layer"].items()}
    assert words == {"gaussian": "indistinguishable", "key_bias": "do not use"}


def test_shifted_keys_change_the_cache_alone(tmp_path, capsys):
    """The float32 model predicts the same; int8 keys suffer, as with a large key bias; fp16 keys do not."""
    model, shifted = TinyModel(), ShiftedKeys(TinyModel(), 60.0)
    tokens = model.texts(1, 64)[0].tokens
    plain, moved = (capture(m, tokens) for m in (model, shifted))
    changed = (moved[0].k - plain[0].k)[0]
    assert (changed != 0).sum(-1).tolist() == [3, 3] and 45 <= changed[changed != 0].abs().min() <= 75
    torch.testing.assert_close(moved[1].q, plain[1].q, rtol=1e-3, atol=1e-3)
    formats = ["--formats", "int8", "fp16/int8", "--shift-keys", "60", "--device", "cpu"]
    assert main([*AMOUNTS, *formats, "--out", str(tmp_path)], built_in=lambda _: TinyModel()) == 0
    kls = {name: part["model"]["overall"]["kl_mean"] for name, part in results_of(tmp_path)["formats"].items()}
    assert kls["int8"] > 20 * kls["fp16/int8"]
    assert "offsets of" in capsys.readouterr().out


def test_scores_with_an_absolute_place_cannot_be_shifted():
    def model_with_sinks(tokens, first_position, attend):
        q = torch.zeros(1, 1, 2, 64)
        return attend(0, q, q, q, sinks=torch.zeros(2))

    model = TinyModel()
    model.logits = model_with_sinks
    with pytest.raises(ValueError, match="--shift-keys needs scores that may all move alike, got sinks"):
        ShiftedKeys(model, 60.0).logits(torch.zeros(1, dtype=torch.long), 0, lambda *_, **__: None)


@pytest.fixture(scope="module")
def hugging_face_folder(tmp_path_factory):
    """A random Qwen2 (biases) that reads bytes, and a text."""
    transformers = pytest.importorskip("transformers", "5.3", "needs transformers 5.3: pip install '.[evaluation]'")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("model")
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    (folder / "text.txt").write_text("".join(chr(32 + (i * i + i // 7) % 90) for i in range(400)))
    return folder


def test_a_hugging_face_folder_is_measured_through_the_cache(hugging_face_folder, tmp_path):
    folder = str(hugging_face_folder)
    arguments = ["--model", folder, "--text", f"{folder}/text.txt", "--dtype", "float32", "--device", "cpu"]
    formats = ["--formats", "fp16", "int8", "int8@head"]
    assert main([*arguments, *formats, *AMOUNTS, "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "report.json").read_text())
    assert record["results"]["controls_passed"], record["results"]["controls"]
    kls = {name: part["model"]["overall"]["kl_mean"] for name, part in record["results"]["formats"].items()}
    assert kls["fp16"] < 1e-6 < kls["int8"] < kls["int8@head"]
    assert record["inputs"]["model"]["class"] == "Qwen2ForCausalLM" and len(record["inputs"]["texts"]) == 2
    assert [text["name"] for text in record["inputs"]["texts"]] == ["text.txt:0", "text.txt:65"]


def test_every_passage_begins_as_the_tokenizer_begins_a_text(hugging_face_folder, tmp_path):
    """A model that has always seen a first token is not judged without it."""
    import shutil

    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "model"
    shutil.copytree(hugging_face_folder, folder)
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "?": 1, "a": 2, "b": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    texts = split_texts({Path("text.txt"): "a b b " * 3}, HuggingFaceModel(folder, dtype="float32"), 2, 5)
    assert [text.tokens.tolist() for text in texts] == [[0, 2, 3, 3, 2], [0, 3, 3, 2, 3]]


def test_what_is_no_model_or_too_little_text_is_refused(hugging_face_folder, tmp_path, capsys):
    folder = str(hugging_face_folder)
    cases = (
        (["--model", str(tmp_path), "--text", f"{folder}/text.txt"], "must be a Hugging Face model folder"),
        (
            ["--model", folder, "--text", f"{folder}/text.txt", "--texts", "9"],
            "must hold 9 passages of 65 tokens, got 6",
        ),
        (["--model", folder, "--text", f"{folder}/text.txt", "--contexts", "256"], "below the model's 256 positions"),
        (["--model", folder, "--text", f"{folder}/no.txt"], "no.txt: No such file"),
        (["--model", folder, "--text", f"{folder}/model.safetensors"], "--text must be UTF-8"),
        (["--model", "not looked at", "--text", f"{folder}/text.txt", "--formats", "int9"], "must be one of fp16"),
        (["--model", "not looked at", "--text", f"{folder}/text.txt", "--device", "gpu"], "device must be"),
        (["--model", "not looked at", "--text", f"{folder}/text.txt", "--device", "meta"], "--device must be one that"),
    )
    for arguments, rule in cases:
        assert main([*AMOUNTS, "--device", "cpu", *arguments, "--out", str(tmp_path / "out")]) == 1
        assert rule in " ".join(capsys.readouterr().out.split())


def test_the_built_in_model_runs_from_the_command_line(tmp_path):
    """A short run; docs/accuracy.md has the long one's figures."""
    script = [sys.executable, str(ROOT / "tools/evaluate.py"), "--formats", "fp16", "int8", "--device", "cpu"]
    result = subprocess.run([*script, *AMOUNTS, "--out", str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    results = results_of(tmp_path)
    assert results["controls_passed"] and results["kv_read_path"] == "cache"
    overall = results["formats"]["int8"]["model"]["overall"]
    assert 1e-6 < overall["kl_mean"] < 1e-3 and overall["count"] == 128

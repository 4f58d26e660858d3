"""Hugging Face folders of every family that docs/accuracy.md names, evaluated through the cache."""

from __future__ import annotations

import json

import pytest
from tiny_language_model import one_thread

from pyquantattn.evaluation import huggingface
from pyquantattn.evaluation.command import main

__all__ = ["one_thread"]  # a fixture that every test uses

for extra in ("matplotlib", "rich"):
    pytest.importorskip(extra, reason=f"the evaluation needs {extra}: pip install '.[test]'")
pytest.importorskip("transformers", "5.3", "needs transformers 5.3: pip install '.[evaluation]'")

from transformers_families import ATTENTION, LEAST_RELEASE, random_model  # noqa: E402
from transformers_models import ALIBI_FAMILIES, INTERFACE_FAMILIES, tiny_model  # noqa: E402

LENGTH = 96
AMOUNTS = [
    *("--contexts", "32", str(LENGTH), "--texts", "2", "--attention-texts", "1", "--uncached", str(LENGTH)),
    *("--greedy-tokens", "0", "--no-ablations", "--formats", "fp16", "int8", "--dtype", "float32"),
]


def evaluate(folder, model, device="cpu"):
    """(exit status, results) of a random model that reads bytes."""
    model.save_pretrained(folder)
    text = folder / "text.txt"
    text.write_text("".join(chr(32 + (i * i + i // 7) % 90) for i in range(2000)))
    out = ["--device", device, "--out", str(folder / "out")]
    status = main(["--model", str(folder), "--text", str(text), *AMOUNTS, *out])
    return status, json.loads((folder / "out" / "report.json").read_text())["results"]


def failed(results):
    return [control["name"] for control in results["controls"] if not control["passed"]]


@pytest.mark.parametrize("family", [*INTERFACE_FAMILIES, *ALIBI_FAMILIES])
def test_every_family_is_measured_through_the_cache(tmp_path, family, device):
    """Windows, soft caps, sinks and ALiBi are honoured, or the control against the model's own attention would fail."""
    status, results = evaluate(tmp_path, tiny_model(family, vocab_size=256), device)
    assert (status, failed(results)) == (0, [])
    kls = {name: figures["model"]["overall"]["kl_mean"] for name, figures in results["formats"].items()}
    assert kls["fp16"] < 1e-8 and kls["fp16"] < 1e-2 * kls["int8"]


# A random Cohere2 takes no notice of its cache, not even of one with wrong scales.
@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(ATTENTION.keys() - {"Cohere2", "Llama4Text"}))
def test_many_families_are_measured_through_the_cache(tmp_path, family):
    pytest.importorskip("transformers", LEAST_RELEASE, reason=f"the families are those of transformers {LEAST_RELEASE}")
    status, results = evaluate(tmp_path, random_model(family, vocab_size=256))
    assert (status, failed(results)) == (0, [])


def test_chunked_attention_is_measured_within_a_chunk(tmp_path, capsys):
    random_model("Llama4Text", vocab_size=256, attention_chunk_size=64).save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text("text " * 400)
    text = ["--text", str(tmp_path / "text.txt"), "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(["--model", str(tmp_path), *text, *AMOUNTS]) == 1
    assert "contexts must end below the model's 64 positions" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("family", ALIBI_FAMILIES)
def test_lost_slopes_are_noticed(tmp_path, family, monkeypatch):
    """The reference has lost them too, so only the model's own attention can tell."""
    attention = huggingface._attention

    def without_slopes(*arguments, alibi_slopes=None, **keywords):
        return attention(*arguments, **keywords)

    monkeypatch.setattr(huggingface, "_attention", without_slopes)
    status, results = evaluate(tmp_path, tiny_model(family, vocab_size=256))
    assert (status, failed(results)) == (2, ["no cache"])


def test_a_model_that_keeps_its_attention_to_itself_is_refused(tmp_path, capsys):
    tiny_model("Falcon", alibi=False, vocab_size=256).save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text("text " * 400)
    text = ["--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")]
    assert main(["--model", str(tmp_path), *text, *AMOUNTS, "--device", "cpu"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "FalconForCausalLM must use transformers' attention interface in every layer, got layers []" in shown


def test_a_head_dim_without_a_kernel_is_refused(tmp_path, capsys):
    tiny_model("Llama", head_dim=20, vocab_size=256).save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text("text " * 400)
    text = ["--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")]
    assert main(["--model", str(tmp_path), *text, *AMOUNTS, "--device", "cpu"]) == 1
    assert "head_dim" in capsys.readouterr().out

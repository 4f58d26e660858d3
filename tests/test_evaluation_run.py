"""Whole runs of the evaluation on a tiny model: resumed, repeated, sabotaged."""

from __future__ import annotations

import copy
import importlib.util
import json
import re

import numpy as np
import pytest
import torch
from tiny_language_model import CountingProgress, TinyModel, one_thread

from pyquantattn.evaluation.command import main
from pyquantattn.evaluation.language_model import capture
from pyquantattn.evaluation.model_level import decode_greedily
from pyquantattn.evaluation.plan import NOISE, Settings
from pyquantattn.evaluation.run import RawResults, run_model
from pyquantattn.evaluation.sequence import LayerCache, QuantizedSequence
from pyquantattn.evaluation.store import PartStore
from pyquantattn.evaluation.summary import Summary

__all__ = ["one_thread"]  # a fixture that every test uses

for extra in ("matplotlib", "rich"):
    pytest.importorskip(extra, reason=f"the evaluation needs {extra}: pip install '.[test]'")

SETTINGS = Settings(
    formats=("fp16", "int8", "fp8_e4m3@head"),
    contexts=(32, 96),
    num_texts=3,
    num_attention_texts=2,
    num_uncached=48,
    greedy_prompt=20,
    greedy_tokens=8,
)


def run(folder, settings=SETTINGS, progress=None):
    model = TinyModel()
    *texts, calibration = model.texts(settings.num_texts + 1, settings.length + 1)
    return run_model(model, texts, calibration, settings, folder, progress or CountingProgress(), model.tokenize)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return Summary(run(tmp_path_factory.mktemp("whole")), SETTINGS).to_json()


def as_text(raw, settings=SETTINGS):
    return json.dumps(Summary(raw, settings).to_json(), sort_keys=True)


def test_a_sound_run_passes_its_controls_and_ranks_the_formats(results):
    assert results["controls_passed"], results["controls"]
    assert [control["name"] for control in results["controls"]] == [
        "bit-exact",
        "noise floor",
        "no cache",
        "wrong scale",
        "kernel",
    ]
    formats = results["formats"]
    kls = {name: figures["model"]["overall"]["kl_mean"] for name, figures in formats.items()}
    assert 0 < kls["fp16"] < 1e-6 < kls["int8"] < kls["fp8_e4m3@head"]
    assert formats["fp16"]["verdict"]["word"] == "indistinguishable"
    assert formats["int8"]["model"]["overall"]["count"] == 3 * 96
    assert [part["count"] for part in formats["int8"]["model"]["by_context"].values()] == [3 * 32, 3 * 64]
    assert list(formats["int8"]["attention"]["by_context"]) == ["32", "96"]


def test_ablations_add_up(results):
    """K alone and V alone each cost less than both, and together about as much."""
    for name in ("int8", "fp8_e4m3@head"):
        both = results["formats"][name]["attention"]["overall"]["output_error"]["mean"]
        parts = [results["formats"][name]["ablations"][only]["output_error"]["mean"] for only in "KV"]
        assert max(parts) < both < 1.2 * sum(parts)
        for part in results["formats"][name]["ablations"].values():
            assert np.shape(part["by_layer_and_head"]) == (2, 4)
            assert np.mean(part["by_layer_and_head"]) == pytest.approx(part["output_error"]["mean"])
    assert results["formats"]["fp16"]["ablations"] == {}


def test_heat_maps_show_k_and_v_apart(results):
    from pyquantattn.evaluation import charts

    drawn = charts.heat_maps(results["formats"])
    for only in "KV":
        changed = copy.deepcopy(results["formats"])
        changed["int8"]["ablations"][only]["by_layer_and_head"][0].reverse()
        assert charts.heat_maps(changed) != drawn, only
    assert charts.heat_maps(results["formats"]) == drawn


def test_memory_counts_scales_and_unfilled_slots(results):
    """96 tokens fill 6 pages of 16; int8 adds two bytes to each vector of 64."""
    bits = {name: figures["memory"]["bits_per_value"] for name, figures in results["formats"].items()}
    assert bits["fp16"] == 16 and bits["int8"] == 8 + 16 / 64 and 8 < bits["fp8_e4m3@head"] < 8.01
    memory = results["formats"]["int8"]["memory"]
    assert memory["bytes_per_token"] == 2 * 2 * 2 * 66 and memory["bytes_per_token_and_layer"] == 2 * 2 * 66
    assert memory["tokens_per_gib"] == 2**30 / memory["bytes_per_token"]


def test_unfilled_slots_cost_memory(tmp_path):
    settings = Settings(formats=("int8",), contexts=(17,), num_texts=1, greedy_tokens=0, num_attention_texts=1)
    found = Summary(run(tmp_path, settings), settings).to_json()
    assert found["formats"]["int8"]["memory"]["bits_per_value"] == pytest.approx((8 + 16 / 64) * 32 / 17)


def test_greedy_continuations_are_those_of_the_model():
    """Against the model's own attention over the whole text, token by token."""
    model, prompt, reference = TinyModel(), TinyModel().texts(1, 20)[0].tokens, SETTINGS.reference()
    found = decode_greedily(model, prompt, 8, reference, SETTINGS.under_test()[:1], None, lambda _: None)
    text = prompt
    for chosen, gap in zip(found.tokens[reference.name], found.top_gap, strict=True):
        best = model.logits(text, 0, None)[-1].softmax(-1).topk(2)
        assert best.indices[0] == chosen and float(best.values[0] - best.values[1]) == pytest.approx(gap, abs=1e-4)
        text = torch.cat([text, best.indices[:1]])
    assert len(found.tokens["int8"]) == 8


def test_a_divergence_beyond_a_tie_is_counted():
    gaps = np.array([0.5, 0.001, 0.3])
    parts = [
        {"greedy|reference": np.array([1, 2, 3]), "greedy|int8": np.array(tokens), "greedy|gap": gaps}
        for tokens in ([1, 2, 3], [1, 9, 3], [1, 2, 9], [9, 9, 9])
    ]
    settings = Settings(formats=("int8",), greedy_tokens=3)
    found = Summary(RawResults([], [], parts, []), settings).greedy("int8")
    # The tie counts up to where it is; what diverges beyond one counts to the end, wrong from there on.
    assert (found["agreeing_tokens"], found["counted_tokens"]) == (3 + 1 + 2 + 0, 3 + 1 + 3 + 3)
    assert found["first_divergence"] == [3, 1, 2, 0] and found["texts_without_divergence"] == 1
    assert found["top_gap_at_divergence"] == [None, 0.001, 0.3, 0.5] and found["divergences_beyond_ties"] == 2


def test_the_same_run_twice_gives_the_same_figures(results, tmp_path):
    assert as_text(run(tmp_path)) == json.dumps(results, sort_keys=True)


@pytest.mark.parametrize(
    ("stage", "after"), [("codec and attention", 3), ("teacher-forced decode", 130), ("greedy decode", 30)]
)
def test_an_interrupted_run_goes_on_and_gives_the_same_figures(results, tmp_path, stage, after):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=CountingProgress(stage, after))
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    assert finished
    progress = CountingProgress()
    assert as_text(run(tmp_path, progress=progress)) == json.dumps(results, sort_keys=True)
    assert all(path.stat().st_mtime_ns == written for path, written in finished.items())
    assert progress.done == progress.totals


def test_parts_of_another_run_are_not_taken(tmp_path):
    run(tmp_path)
    other = Settings(**{**SETTINGS.to_json(), "num_uncached": 32})
    run(tmp_path, other)
    assert len(list(tmp_path.glob("parts-*"))) == 2


def test_a_part_is_whole_or_absent(tmp_path):
    store = PartStore(tmp_path, "description")

    def fail():
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store.load_or_make("part", fail)
    made, was_there = store.load_or_make("part", lambda: {"tokens|fp16/int8|kl": np.arange(3.0)})
    again, is_there = store.load_or_make("part", fail)
    assert not was_there and is_there and made.keys() == again.keys()
    assert np.array_equal(made["tokens|fp16/int8|kl"], again["tokens|fp16/int8|kl"])


def failing_controls(folder):
    found = Summary(run(folder), SETTINGS).to_json()
    words = [figures["verdict"]["word"] for figures in found["formats"].values()]
    words += [part["word"] for figures in found["formats"].values() for part in figures["by_layer"].values()]
    failed = [control["name"] for control in found["controls"] if not control["passed"]]
    assert bool(failed) != found["controls_passed"] and (set(words) == {None}) == bool(failed)
    return failed


def test_a_scale_that_is_not_read_is_noticed(tmp_path, monkeypatch):
    append = LayerCache.append
    monkeypatch.setattr(LayerCache, "append", lambda self, k, v, scale_factor=1.0: append(self, k, v))
    assert failing_controls(tmp_path) == ["wrong scale"]


def test_a_cache_that_is_not_read_is_noticed(tmp_path, monkeypatch):
    """Attention over the fresh K and V of the whole past, what a prefill does: the wrong scales go unseen."""
    kept = {}

    def attend_fresh(self, layer, q, k, v, /, **options):
        attend(self, layer, q, k, v, **options)
        past = kept.setdefault((id(self), layer), (self, []))[1]  # a sequence kept alive keeps its id
        past.append((k[0], v[0]))
        from pyquantattn.evaluation.exact import exact_attention

        keys, values = (torch.cat(parts) for parts in zip(*past, strict=True))
        return exact_attention(q[0], keys, values, len(keys) - q.shape[1], options).out[None].to(q.dtype)

    attend = QuantizedSequence.__call__
    monkeypatch.setattr(QuantizedSequence, "__call__", attend_fresh)
    assert "wrong scale" in failing_controls(tmp_path)


def test_a_result_that_varies_is_noticed(tmp_path, monkeypatch):
    attend, generator = LayerCache.attend, torch.Generator().manual_seed(0)

    def noisy(self, *arguments):
        out = attend(self, *arguments)
        return out * (1 + 1e-6 * torch.randn(out.shape, generator=generator))

    monkeypatch.setattr(LayerCache, "attend", noisy)
    assert failing_controls(tmp_path) == ["bit-exact"]


def test_a_kernel_that_is_wrong_where_it_splits_is_noticed(tmp_path, monkeypatch):
    attend = LayerCache.attend

    def wrong(self, q, first_position, contestant, options):
        return attend(self, q, first_position, contestant, options) * (1.5 if contestant.name == NOISE else 1.0)

    monkeypatch.setattr(LayerCache, "attend", wrong)
    assert failing_controls(tmp_path) == ["noise floor"]


def test_a_kernel_that_is_wrong_everywhere_is_noticed(tmp_path, monkeypatch):
    """The reference is as wrong as the formats, so only the model's own attention and float64 can tell."""
    attend = LayerCache.attend
    monkeypatch.setattr(LayerCache, "attend", lambda self, *arguments: 1.2 * attend(self, *arguments))
    assert failing_controls(tmp_path) == ["no cache", "kernel"]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"contexts": (64, 32)}, "contexts must increase"),
        ({"contexts": (8,)}, "contexts must increase from at least 16"),
        ({"contexts": ()}, "contexts must increase"),
        ({"formats": ("int8", "int8")}, "formats must be distinct"),
        ({"formats": ()}, "formats must be distinct and at least one"),
        ({"formats": ("int9",)}, "kv_format must be one of"),
        ({"num_texts": 0}, "num_texts must be at least 1"),
        ({"greedy_tokens": -1}, "greedy_tokens must be at least 0"),
        ({"reference_format": "int8"}, "reference must be one of fp16, bf16"),
    ],
)
def test_bad_settings_are_refused(change, rule):
    with pytest.raises(ValueError, match=f"^evaluate: {rule}"):
        Settings(**change)


COMMAND = [
    *("--contexts", "32", "64", "--texts", "2", "--attention-texts", "1", "--uncached", "32"),
    *("--greedy-prompt", "20", "--greedy-tokens", "4", "--device", "cpu"),
]


def test_the_command_writes_reports_that_agree(tmp_path, capsys):
    """Terminal, JSON, HTML, CSV; exit status 0."""
    arguments = [*COMMAND, "--formats", "fp16", "int8", "int8+0=fp16", "--out", str(tmp_path)]
    assert main(arguments, built_in=lambda _: TinyModel()) == 0
    shown = capsys.readouterr().out
    record = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)  # no NaN in JSON
    page = (tmp_path / "report.html").read_text()
    for name, figures in record["results"]["formats"].items():
        assert name in shown and f"<h3>{name}</h3>" in page
        assert figures["verdict"]["word"] in shown and figures["verdict"]["reason"] in page
    assert not re.search(r"<script|<link|<img|@import|url\((?!#)|href=\"(?!#|data:)|src=", page), (
        "the report needs other files"
    )
    assert page.count("<svg") == 6 and "width=device-width" in page
    for key in ("settings", "environment", "inputs", "measured_times"):
        assert record[key]
    assert [text["name"] for text in record["inputs"]["texts"]] == ["text 0", "text 1"]
    assert record["inputs"]["texts"][0]["sha256"] and record["environment"]["kernels"]["int8"]["backend"] == "cpu"
    rows = (tmp_path / "tokens.csv").read_text().splitlines()
    kls = [float(row.split(",")[3]) for row in rows[1:] if row.split(",")[1] == "int8"]
    assert np.mean(kls) == pytest.approx(record["results"]["formats"]["int8"]["model"]["overall"]["kl_mean"], rel=1e-6)
    assert len((tmp_path / "attention.csv").read_text().splitlines()) > 100


def test_each_layer_alone_costs_less_than_all(tmp_path):
    arguments = [*COMMAND, "--no-ablations", "--greedy-tokens", "0", "--formats", "int8", "--each-layer", "int8"]
    assert main([*arguments, "--out", str(tmp_path)], built_in=lambda _: TinyModel()) == 0
    formats = json.loads((tmp_path / "report.json").read_text())["results"]["formats"]
    kls = {name: figures["model"]["overall"]["kl_mean"] for name, figures in formats.items()}
    assert list(kls) == ["int8", "fp16+0=int8", "fp16+1=int8"]
    assert 1e-8 < kls["fp16+0=int8"] < kls["int8"] > kls["fp16+1=int8"] > 1e-8
    errors = [[part["output_error"] > 2e-3 for part in figures["by_layer"].values()] for figures in formats.values()]
    assert errors == [[True, True], [True, False], [False, True]]


def test_raw_values_of_codec_and_channels_are_written(tmp_path):
    assert main([*COMMAND, "--formats", "int8", "--out", str(tmp_path)], built_in=lambda _: TinyModel()) == 0
    results = json.loads((tmp_path / "report.json").read_text())["results"]
    codec = [row.split(",") for row in (tmp_path / "codec.csv").read_text().splitlines()]
    errors = [float(row[5]) for row in codec if row[1] == "int8" and row[3] == "K"]
    assert codec[0][:6] == ["text", "contestant", "layer", "kv", "head", "relative_rmse"] and len(errors) == 2 * 2
    assert np.mean(errors) == pytest.approx(results["formats"]["int8"]["codec"]["K"]["relative_rmse_mean"], rel=1e-4)
    model = TinyModel()
    keys = capture(model, model.texts(1, 64)[0].tokens)[1].k.double()
    channels = [row.split(",") for row in (tmp_path / "channels.csv").read_text().splitlines()]
    found = np.array([[float(x) for x in row[5:]] for row in channels if row[:3] == ["0", "1", "K"]])
    np.testing.assert_allclose(found[:, 0], keys.mean(0).flatten(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[:, 1], keys.std(0, unbiased=False).flatten(), rtol=1e-4)
    crest = (keys.abs().amax(-1) / keys.square().mean(-1).sqrt()).mean(0)
    assert results["layers"]["1"]["K"]["crest"] == pytest.approx(crest.tolist(), rel=1e-5)


def test_the_command_gives_no_verdict_where_a_control_fails(tmp_path, capsys, monkeypatch):
    append = LayerCache.append
    monkeypatch.setattr(LayerCache, "append", lambda self, k, v, scale_factor=1.0: append(self, k, v))
    assert main([*COMMAND, "--formats", "int8", "--out", str(tmp_path)], built_in=lambda _: TinyModel()) == 2
    shown, page = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    assert "A control failed" in shown and "no verdict" in shown and "FAILED" in shown
    assert 'class="alarm"' in page and '<p class="word">no verdict</p>' in page and 'td class="bad">FAILED' in page


def test_a_model_of_nan_gets_its_report_and_no_verdict(tmp_path, capsys, monkeypatch):
    logits = TinyModel.logits
    monkeypatch.setattr(TinyModel, "logits", lambda self, *given: logits(self, *given) * float("nan"))
    assert main([*COMMAND, "--formats", "int8", "--out", str(tmp_path)], built_in=lambda _: TinyModel()) == 2
    assert "no verdict" in capsys.readouterr().out and "no verdict" in (tmp_path / "report.html").read_text()


def test_the_command_can_be_interrupted(tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(TinyModel, "logits", interrupt)
    assert main([*COMMAND, "--out", str(tmp_path)], built_in=lambda _: TinyModel()) == 130
    assert "goes on" in capsys.readouterr().out


def test_without_its_extras_the_command_says_what_to_install(capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else find_spec(name))
    assert main(["--profiles"]) == 1
    assert capsys.readouterr().out == "pyquantattn-evaluate: needs rich: pip install 'pyquantattn[evaluation]'\n"

"""Pass keys hidden in a text: where they are put, when they count as found, and what is made of the counts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from tiny_language_model import TinyModel, one_thread

from pyquantattn.evaluation.command import main
from pyquantattn.evaluation.needles import ANSWER, NEEDLE, NEEDLE_DEPTHS, QUESTION, hide, look_up, needle_figures
from pyquantattn.evaluation.sequence import Contestant
from pyquantattn.evaluation.spec import CacheSpec

__all__ = ["one_thread"]  # a fixture that every test uses

KEY = "271828"
FP16 = Contestant("fp16", CacheSpec.parse("fp16"))


def letters(text):
    return torch.tensor(list(text.encode()))


def test_the_needle_is_hidden_at_its_depth():
    text = letters("<" + "h" * 299)
    for depth in NEEDLE_DEPTHS:
        tokens, num_answer = hide(text, 200, depth, KEY, letters)
        shown = bytes(tokens.tolist()).decode()
        needle = NEEDLE.format(KEY)
        assert len(shown) == 200 and shown.startswith("<") and shown.count(KEY) == 2
        assert shown.endswith(QUESTION + ANSWER.format(KEY)) and num_answer == len(ANSWER.format(KEY))
        haystack = shown[: -len(QUESTION) - num_answer].replace(needle, "")
        assert haystack == "<" + "h" * (len(haystack) - 1)
        assert shown.index(needle) == 1 + round(depth * (len(haystack) - 1))


def test_a_context_without_room_is_refused():
    with pytest.raises(ValueError, match=r"^evaluate: --needles needs contexts of at least 105 tokens, got 104"):
        hide(letters("h" * 200), 104, 0.5, KEY, letters)
    assert len(hide(letters("h" * 200), 105, 0.5, KEY, letters)[0]) == 105


def test_a_key_is_found_where_greedy_decoding_would_write_it():
    """Against the model's own attention, 300 tokens long: more than one block is encoded before the answer."""
    model = TinyModel(seed=3)
    model.positions = model.positions.repeat(2, 1)
    text = torch.randint(32, (300,), generator=torch.Generator().manual_seed(1))
    for _ in range(4):
        text = torch.cat([text, model.logits(text, 0, None)[-1].argmax()[None]])
    nll, found = look_up(model, text, 4, FP16, None)
    expected = model.logits(text[:-1], 0, None)[-4:].log_softmax(-1).gather(-1, text[-4:, None])
    assert found and nll == pytest.approx(-float(expected.sum()), abs=1e-3)
    for position in range(-4, 0):
        wrong = text.clone()
        wrong[position] = (wrong[position] + 1) % 32
        assert not look_up(model, wrong, 4, FP16, None)[1], position


def test_lost_and_won_keys_are_paired_with_the_reference():
    found = {"reference": [[1, 1, 1, 1, 0]], "int8": [[1, 0, 0, 1, 1]]}
    nll = {"reference": [[1, 1, 1, 1, 4]], "int8": [[1, 3, 3, 1, 2]]}
    arrays = {f"found|{name}": np.array(table, dtype=np.bool_) for name, table in found.items()}
    arrays |= {f"nll|{name}": np.array(table, dtype=np.float64) for name, table in nll.items()}
    figures = needle_figures([arrays] * 4, "int8")
    assert (figures["count"], figures["lost"], figures["won"]) == (20, 8, 4)
    assert figures["found_percent"] == 60 and figures["reference_found_percent"] == 80
    assert figures["p_value"] == pytest.approx(0.3877, abs=1e-4)  # a binomial table: 2 * P(X <= 4), n = 12, p = 1/2
    assert figures["nll_change"] == pytest.approx(0.4) and 0.2 < figures["nll_change_standard_error"] < 0.5
    assert figures["found_percent_by_context_and_depth"] == [[100, 0, 0, 100, 100]]
    reference = needle_figures([arrays] * 4, "noise floor")
    assert (reference["lost"], reference["won"], reference["p_value"]) == (0, 0, 1.0)


AMOUNTS = [
    *("--contexts", "128", "192", "--texts", "2", "--attention-texts", "1", "--uncached", "32", "--greedy-tokens", "0"),
    *("--no-ablations", "--formats", "fp16", "int8", "fp8_e5m2", "--device", "cpu", "--needles", "3"),
]


def test_the_report_shows_the_grid(tmp_path, capsys):
    assert main([*AMOUNTS, "--out", str(tmp_path)], built_in=lambda _: TinyModel()) == 0
    assert "pass keys" in capsys.readouterr().out
    record = json.loads((tmp_path / "report.json").read_text())
    figures = {name: part["needles"] for name, part in record["results"]["formats"].items()}
    assert {part["count"] for part in figures.values()} == {3 * 2 * 5}
    assert 0 < abs(figures["int8"]["nll_change"]) < 0.1 < 10 * abs(figures["fp8_e5m2"]["nll_change"])
    page = (tmp_path / "report.html").read_text()
    assert "Pass keys found, by depth and context" in page and page.count("<svg") == 7
    assert "| int8 | 30 |" in (tmp_path / "report.md").read_text()
    parts = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("needles-*.npz")}
    assert len(parts) == 3
    assert main([*AMOUNTS, "--out", str(tmp_path)], built_in=lambda _: TinyModel()) == 0
    assert all(path.stat().st_mtime_ns == written for path, written in parts.items())
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["results"] == record["results"]
    assert again["measured_cost"]["num_reused_parts"] == 1 + 2 + 3 and record["measured_cost"]["num_reused_parts"] == 0
    assert record["measured_cost"]["cpu_seconds"] > 0 and record["measured_cost"]["peak_bytes"] > 2**26


PHONE = 390  # CSS pixels
PAGE = """<iframe id=page src="report.html" style="width:{width}px;height:900px;border:0"></iframe><pre id=found></pre>
<script>page.onload = () => {{
  const body = page.contentDocument.body, wide = [...body.querySelectorAll('*')].filter(
    e => e.getBoundingClientRect().right > {width} && !e.closest('.table') && !e.closest('pre'));
  found.textContent = `width ${{page.contentDocument.documentElement.scrollWidth}}, ${{wide.length}} beyond, ` +
    `${{body.querySelectorAll('figure svg').length}} drawings`;
}}</script>"""


def test_the_report_fits_a_phone_in_a_real_browser(tmp_path):
    """Nothing but the tables, which scroll by themselves, is wider than the screen."""
    browser = next((found for found in map(shutil.which, ("chromium", "google-chrome", "chrome")) if found), None)
    if browser is None:
        pytest.skip("no Chromium on the PATH")
    assert main([*AMOUNTS, "--out", str(tmp_path)], built_in=lambda _: TinyModel()) == 0
    (tmp_path / "phone.html").write_text(PAGE.format(width=PHONE))
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-web-security",
        "--virtual-time-budget=5000",
    ]
    options += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    command = [browser, *options, (tmp_path / "phone.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    width, beyond, drawings = map(int, re.search(r"width (\d+), (\d+) beyond, (\d+) drawings", shown).groups())
    assert PHONE - 20 <= width <= PHONE and beyond == 0 and drawings == 7


def test_short_contexts_are_refused_before_anything_is_measured(tmp_path, capsys):
    short = ["--contexts", "104", "128", "--out", str(tmp_path)]
    assert main([*AMOUNTS, *short], built_in=lambda _: TinyModel()) == 1
    assert "--needles needs contexts of at least" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.npz"))

"""The tables of a record in Markdown, and docs/accuracy.md, which is made of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pyquantattn.evaluation.markdown import render_document, report, table_to_markdown
from pyquantattn.evaluation.tables import tables

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks/accuracy-pybyte-8m.json"


@pytest.fixture(scope="module")
def record():
    return json.loads(RECORD.read_text())


@pytest.mark.parametrize(("document", "least"), [("README.md", 1), ("docs/accuracy.md", 8)])
def test_documents_show_what_their_records_hold(tmp_path, document, least):
    """python tools/evaluate.py --render DOCUMENT changes nothing."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    copy = Path(shutil.copy(ROOT / document, tmp_path / document))
    assert render_document(copy) >= least
    assert copy.read_text() == (ROOT / document).read_text()


def test_the_published_run_is_sound(record):
    """The promise for the built-in model: int8 is indistinguishable, FP8 is visible at most."""
    results = record["results"]
    assert results["controls_passed"] and results["kv_read_path"] == "cache"
    assert record["settings"]["contexts"][-1] == 2048 and record["settings"]["num_texts"] == 8
    words = {name: figures["verdict"]["word"] for name, figures in results["formats"].items()}
    assert words["int8"] == "indistinguishable" and "do not use" not in words.values()
    int8 = results["formats"]["int8"]["model"]["overall"]
    assert int8["kl_mean"] <= 1e-3 and int8["same_top_percent"] >= 99


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("accuracy-*.json")), ids=lambda path: path.stem)
def test_every_published_record_passed_its_controls(path):
    text = path.read_text()
    record = json.loads(text)
    assert record["results"]["controls_passed"] and record["results"]["kv_read_path"] == "cache"
    assert "tools/evaluate.py" in record["environment"]["command"][0] and "/opt/" not in text


def test_every_table_is_in_the_report(record):
    page = report(record)
    for table in tables(record):
        assert f"## {table.title}\n" in page and table_to_markdown(table) in page
        assert all(len(row) == len(table.header) for row in table.rows), table.key


def test_a_missing_standard_error_is_left_out(record):
    """Null in a record: too few tokens for one."""
    changed = json.loads(json.dumps(record))
    changed["results"]["formats"]["int8"]["model"]["overall"]["kl_standard_error"] = None
    cells = {table.key: table for table in tables(changed)}["predictions"].rows
    shown = {row[0]: row[2] for row in cells}
    assert "±" not in shown["int8"] and "±" in shown["fp8_e4m3"]


def test_a_marker_that_names_no_table_is_refused(tmp_path, record):
    (tmp_path / "record.json").write_text(json.dumps(record))
    document = tmp_path / "document.md"
    document.write_text("<!-- accuracy record.json nothing -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match=r"^evaluate: a marker must name one of verdicts, .* got 'nothing'"):
        render_document(document)
    document.write_text("before\n<!-- accuracy record.json layers -->\nold\n<!-- end -->\nafter\n")
    assert render_document(document) == 1
    text = document.read_text()
    assert text.startswith("before\n<!--") and "| layer | fp16 |" in text and "old" not in text
    assert text.endswith("<!-- end -->\nafter\n")

"""The list of mutations, which the suite does not run, stays in step with the code that they break."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from mutation.mutations import MUTATIONS  # noqa: E402


def test_every_mutation_finds_its_place_once():
    lost = [m.name for m in MUTATIONS if (ROOT / m.file).read_text().count(m.anchor) != 1]
    assert not lost


def test_the_tests_of_every_mutation_exist():
    for path, _, name in {test.partition("::") for mutation in MUTATIONS for test in mutation.tests}:
        assert f"def {name}" in (ROOT / path).read_text(), (path, name)

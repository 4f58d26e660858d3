"""No kernel reads or writes beside its tensors: each lies against a page that faults when it is touched."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pyquantattn import _core

CPU_VARIANTS = list(dict.fromkeys(row[1] for row in _core.decode_kernels() if row[0] == "cpu" and row[6]))
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="guards pages with mprotect")


def run(side, variant):
    program = Path(__file__).parent / "guard_pages.py"
    return subprocess.run([sys.executable, program, side, variant], capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize("variant", CPU_VARIANTS)
@pytest.mark.parametrize("side", ["start", "end"])
def test_kernels_stay_inside_their_tensors(side, variant):
    """Tails of vectors and of tiles, at both ends of every tensor of a call."""
    result = run(side, variant)
    assert result.returncode == 0 and "stayed inside" in result.stdout, result.stderr[-3000:]


@pytest.mark.parametrize("side", ["start", "end"])
def test_the_guards_fault(side):
    assert run(side, "touch").returncode == -signal.SIGSEGV

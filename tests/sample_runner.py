"""Runs the C++ sample runner on a small problem."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

SMALL = {
    "--batch-size": "3",
    "--seq-k": "33,7,100",
    "--num-q-heads": "4",
    "--num-kv-heads": "2",
    "--head-dim": "64",
    "--warmup-iterations": "0",
    "--profiling-iterations": "1",
    "--threads": "1",
}


def run_sample_runner(build: Path, *arguments: str, **small: str) -> subprocess.CompletedProcess[str]:
    """`small` replaces options of SMALL or adds to them; `arguments` follow."""
    options = SMALL | small
    command = [build / "tools/sample_runner/sample_runner", *(x for pair in options.items() for x in pair)]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)


def rows_of(build: Path, *arguments: str, **small: str) -> list[dict[str, Any]]:
    """The rows of a JSON report of a run that must end well."""
    result = run_sample_runner(build, "--output", "json", *arguments, **small)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    return json.loads(result.stdout)

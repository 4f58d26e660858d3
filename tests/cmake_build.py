"""Builds of the C++ library, for tests of what its users meet."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """The output of a command that must succeed."""
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


def build_project(source: Path, build: Path, *options: str) -> Path:
    launcher = ["-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"] if shutil.which("ccache") else []
    run("cmake", "-G", "Ninja", "-S", source, "-B", build, *launcher, *options)
    run("cmake", "--build", build)
    return build


def build_library(build: Path, *options: str) -> Path:
    return build_project(ROOT, build, "-DQATTN_CUDA=OFF", *options)

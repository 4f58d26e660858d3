"""What a published measurement must name: device, versions, commit, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyquantattn as qa

from .cpu_timing import l3_bytes

PACKAGES = (
    "pyquantattn",
    "torch",
    "onnxruntime",
    "flashinfer-python",
    "numpy",
    "transformers",
    "hqq",
    "optimum-quanto",
)


def _cpu_name() -> str:
    """Model name, with the vector extensions that tell virtual machines of one name apart."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    fields = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info.read_text().splitlines())
    }
    family = f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
    return f"{fields.get('model name', platform.machine())} ({family})"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str:
    named = os.environ.get("BENCHMARK_COMMIT")  # a copy of the tree, without its history or with that of another
    if named:
        return named
    folder = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        )
        paths = ["cpp", "cuda", "pyquantattn", "cmake", "CMakeLists.txt"]
        diff = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *paths], cwd=folder.parents[1], check=False)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if diff.returncode else "")


def describe_run() -> dict[str, Any]:
    """Everything that a reader needs to place a run, paths of this machine left out."""
    arguments = [Path(argument).name if argument.startswith("/") else argument for argument in sys.argv[1:]]
    return {
        "command": " ".join(["python tools/benchmark.py", *arguments]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "versions": _versions(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "last_level_cache_mib": l3_bytes() >> 20,
        "backends": list(qa.available_backends()),
    }

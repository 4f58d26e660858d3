"""The C++ sample runner on a GPU. A CUDA build takes minutes, so tests make none: QUANTATTN_SAMPLE_RUNNER names its
program."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from pyquantattn.formats import KV_PAIRS

pytestmark = pytest.mark.timeout(900)  # the first test waits for the build


@pytest.fixture
def run(static_build):
    """The output of the program that the environment names, else of the one without CUDA that tests build."""
    program = os.environ.get("QUANTATTN_SAMPLE_RUNNER") or static_build / "tools/sample_runner/sample_runner"

    def output(*arguments):
        command = [Path(program), "--seq-k", "33,100", "--num-q-heads", "4", "--num-kv-heads", "2", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    return output


@pytest.fixture
def has_gpu(run):
    return re.search(r"^backend cuda: [1-9]", run("--info"), flags=re.MULTILINE) is not None


def test_a_gpu_is_used_where_there_is_one(run, has_gpu):
    """Unless the command line speaks of a CPU: by its name, its threads or one of its kernels."""
    small = ("--profiling-iterations", "1", "--output", "json")
    [row] = json.loads(run(*small))
    assert row["backend"] == ("cuda" if has_gpu else "cpu")
    for option, value in (("--device", "cpu"), ("--threads", "1"), ("--kernel", "scalar")):
        [row] = json.loads(run(*small, option, value))
        assert row["backend"] == "cpu"


@pytest.mark.parametrize("mode", ["--decoding", "--hybrid", "--mode=prefill"])
def test_every_format_is_right_on_cuda(mode, run, has_gpu):
    if not has_gpu:
        pytest.skip("needs a GPU, and QUANTATTN_SAMPLE_RUNNER to name the sample runner of a build with CUDA")
    rows = json.loads(run(*mode.split("="), "--kv-format", "all", "--profiling-iterations", "1", "--output", "json"))
    assert {row["kv_format"] for row in rows} == set(KV_PAIRS)
    assert all((row["backend"], row["status"]) == ("cuda", "right") for row in rows), rows

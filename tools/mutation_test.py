"""Breaks the kernels on purpose and demands that the test suite notices.

    python tools/mutation_test.py                 all of the CPU backend, about twenty minutes on two cores
    python tools/mutation_test.py --device cuda   all of CUDA kernels, on a machine with a GPU
    python tools/mutation_test.py --only sink     those whose name contains "sink"
    python tools/mutation_test.py --list          names on every device, and the anchors that are gone

It works on a copy of the checkout in a temporary directory. A mutation whose anchor is gone, one that does not
compile, and one that no test notices are failures; so is a suite that is red without any mutation. On cuda those of
a mutation's tests run that take a GPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from mutation.mutation import Mutation
from mutation.mutations import MUTATIONS

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 3600  # of a build or a run of tests: nvcc takes minutes for a changed header
# An editable install redirects `import pyquantattn` to the checkout: the copy must win, in child processes too.
SITE_CUSTOMIZE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "Redirecting" not in type(finder).__name__]
sys.path.insert(0, {source!r})
"""
RUN_PYTEST = """
import sys, pyquantattn, pytest
assert pyquantattn.__file__.startswith(sys.argv[1]), pyquantattn.__file__
sys.exit(pytest.main(sys.argv[2:]))
"""


class Workshop:
    """A copy of the repository that is built for a device and tested on it."""

    def __init__(self, directory: Path, device: str) -> None:
        self.device = device
        self.source, self.build, self.site = directory / "source", directory / "build", directory / "site"
        self.site.mkdir()
        (self.site / "sitecustomize.py").write_text(SITE_CUSTOMIZE.format(source=str(self.source)))
        for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.splitlines():
            if (ROOT / name).is_file():
                (self.source / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, self.source / name)
        launcher = ["-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"] if shutil.which("ccache") else []
        cuda = f"-DQATTN_CUDA={'ON' if device == 'cuda' else 'OFF'}"
        options = ["-DQATTN_BUILD_PYTHON=ON", "-DQATTN_BUILD_TOOLS=OFF", cuda, *launcher]
        python = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11_directory()}"]
        configured = run("cmake", "-G", "Ninja", "-S", self.source, "-B", self.build, *options, *python)
        if configured.returncode != 0:
            raise SystemExit(configured.stdout + configured.stderr)

    def compiles(self) -> bool:
        if run("cmake", "--build", self.build).returncode != 0:
            return False
        module = next((self.build / "cpp/binding").glob("_core*.so"))
        shutil.copyfile(module, self.source / "pyquantattn" / module.name)
        return True

    def tests_pass(self, tests: tuple[str, ...]) -> bool:
        # Timed by a thread: a signal does not reach Python while it waits for a GPU.
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--timeout=120"]
        options.append("--timeout-method=thread")
        selection = ["-k", "cuda"] if self.device == "cuda" else []
        try:
            command = (sys.executable, "-c", RUN_PYTEST, self.source, *options, *selection, *tests)
            result = run(*command, cwd=self.source, environment={"PYTHONPATH": str(self.site)})
        except subprocess.TimeoutExpired:
            return False
        return result.returncode == 0


def run(
    *command: str | Path, cwd: Path | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`environment` joins this process's own."""
    variables = os.environ | (environment or {})
    return subprocess.run(
        command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )


def pybind11_directory() -> str:
    return run(sys.executable, "-m", "pybind11", "--cmakedir").stdout.strip()


def problem_with_anchor(mutation: Mutation, source: Path) -> str:
    count = (source / mutation.file).read_text().count(mutation.anchor)
    return "" if count == 1 else f"ANCHOR found {count} times in {mutation.file}"


def outcome(workshop: Workshop, mutation: Mutation) -> str:
    """ "caught", or what is wrong with the mutation or the suite."""
    if problem := problem_with_anchor(mutation, workshop.source):
        return problem
    path = workshop.source / mutation.file
    original = path.read_text()
    path.write_text(original.replace(mutation.anchor, mutation.replacement))
    try:
        if not workshop.compiles():
            return "DOES NOT COMPILE"
        return "SURVIVED" if workshop.tests_pass(mutation.tests) else "caught"
    finally:
        path.write_text(original)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose kernels are broken (cpu)")
    parser.add_argument("--only", default="", help="run the mutations whose name contains this")
    parser.add_argument("--list", action="store_true", help="print names and lost anchors, and exit")
    arguments = parser.parse_args()
    chosen = [m for m in MUTATIONS if arguments.only.lower() in m.name.lower()]
    if arguments.list:
        problems = {m.name: problem_with_anchor(m, ROOT) for m in chosen}
        print("\n".join(f"{name}  {problem}".rstrip() for name, problem in problems.items()))
        return 1 if any(problems.values()) else 0
    chosen = [m for m in chosen if m.device == arguments.device]
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs an NVIDIA GPU, and torch finds none")
    with tempfile.TemporaryDirectory(prefix="quantattn-mutation-") as directory:
        workshop = Workshop(Path(directory), arguments.device)
        suites = sorted({m.tests for m in chosen})
        if not workshop.compiles() or not all(workshop.tests_pass(tests) for tests in suites):
            print("the suite is red without any mutation")
            return 1
        failures = 0
        for mutation in chosen:
            start = time.perf_counter()
            result = outcome(workshop, mutation)
            failures += result != "caught"
            print(f"{result:10s} {mutation.name} ({time.perf_counter() - start:.0f} s)", flush=True)
    print(f"{len(chosen) - failures} of {len(chosen)} mutations caught")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""Reports registers, spills and shared memory of every compiled CUDA kernel.

    python tools/kernel_resources.py build/libquantattn.a [--all] [--cuobjdump PATH]

Reads the resource usage that the compiler stored in the object files, so it needs no GPU. Exits with 1 where a kernel
spills registers to local memory.
"""

import argparse
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FUNCTION = re.compile(r"Function (\S+):")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
ARCHITECTURE = re.compile(r"arch = (sm_\w+)")


@dataclass(frozen=True)
class Kernel:
    """What one kernel of one architecture takes; bytes are for each thread, except shared memory's."""

    name: str
    architecture: str
    registers: int
    stack_bytes: int
    shared_bytes: int


def find_tool(name: str, given: str | None) -> str:
    """Returns the path of a CUDA tool; it may also come from the PyPI package nvidia-cuda-cuobjdump."""
    if given is not None:
        return given
    found = shutil.which(name)
    if found is not None:
        return found
    for path in map(Path, sys.path):
        for candidate in path.glob(f"nvidia/*/bin/{name}"):
            return str(candidate)
    raise SystemExit(f"kernel_resources: {name} must be on the PATH or installed from PyPI, got neither")


def read_kernels(text: str) -> list[Kernel]:
    """Parses the output of `cuobjdump --dump-resource-usage`."""
    kernels = []
    architecture = name = "unknown"
    for line in text.splitlines():
        if match := ARCHITECTURE.search(line):
            architecture = match.group(1)
        elif match := FUNCTION.search(line):
            name = match.group(1)
        elif match := USAGE.search(line):
            registers, stack, shared, _ = map(int, match.groups())
            kernels.append(Kernel(name, architecture, registers, stack, shared))
    return kernels


def demangle(names: list[str]) -> list[str]:
    """Returns readable names where c++filt is installed, else the names themselves."""
    tool = shutil.which("c++filt")
    if tool is None:
        return names
    result = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def shorten(name: str) -> str:
    """Keeps the kernel, its engine and its compile-time numbers."""
    name = re.sub(r"quantattn::(cuda|formats)::|\(anonymous namespace\)::|\((int|bool)\)", "", name)
    name = re.sub(r"^void |\([A-Za-z:]*\)$", "", name)
    return re.sub(r", TilePipeline<[^>]*>", "", name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", type=Path, help="an object file, a library or an executable with CUDA code")
    parser.add_argument(
        "--all", action="store_true", help="print every kernel, not only a summary and those that spill"
    )
    parser.add_argument("--cuobjdump", help="path of the tool")
    arguments = parser.parse_args()
    tool = find_tool("cuobjdump", arguments.cuobjdump)
    command = [tool, "--dump-resource-usage", str(arguments.binary)]
    kernels = read_kernels(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    if not kernels:
        raise SystemExit(f"kernel_resources: {arguments.binary} must contain CUDA kernels, got none")
    names = demangle([kernel.name for kernel in kernels])
    spilling = 0
    for kernel, name in sorted(zip(kernels, names, strict=True), key=lambda pair: (pair[0].architecture, pair[1])):
        spilling += kernel.stack_bytes > 0
        if arguments.all or kernel.stack_bytes > 0:
            print(
                f"{kernel.architecture} {kernel.registers:4d} registers {kernel.stack_bytes:5d} B stack "
                f"{kernel.shared_bytes:6d} B static shared  {shorten(name)}"
            )
    most = max(kernel.registers for kernel in kernels)
    print(f"{len(kernels)} kernels, at most {most} registers, {spilling} with a stack frame (spills)")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())

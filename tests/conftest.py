"""Every test that takes `device` runs on every backend that this machine can run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from cmake_build import build_library
from hypothesis import settings

import pyquantattn
from pyquantattn.runtime import force_kernel, prefill_variants

# The same examples in every run, so that a green suite stays green; `--hypothesis-profile=default` draws new ones.
settings.register_profile("reproducible", derandomize=True, database=None)
settings.load_profile("reproducible")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        # So that `-k cuda` takes everything that needs a GPU, whatever its name.
        if "cuda" in getattr(item, "fixturenames", ()):
            item.extra_keyword_matches.add("cuda")
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes: run with --slow"))


# A test takes the fixture of the operation that it calls. Where a backend lacks the operation, it is skipped for that.
FIXTURES = {
    "device": ("decode_attention", "int8"),
    "prefill_device": ("prefill_attention", None),
    "hybrid_device": ("hybrid_attention", "int8"),
}


def devices_with(operation: str, kv_format: str | None) -> list:
    """Every usable backend, marked to be skipped where it has no kernel for the operation."""

    def parameter(backend: str) -> object:
        if pyquantattn.supports(kv_format, 64, operation=operation, device=backend):
            return backend
        reason = f"the {backend} backend has no kernel for {operation}"
        return pytest.param(backend, marks=pytest.mark.skip(reason=reason))

    return [parameter(backend) for backend in pyquantattn.available_backends()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name in FIXTURES.keys() & set(metafunc.fixturenames):
        parameters = devices_with(*FIXTURES[name])
        if name != "device" and "hopper" in prefill_variants():
            parameters.append("cuda-tensor_cores")
        metafunc.parametrize(name, parameters, indirect=name != "device")


def on_each_kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """A Hopper GPU has two kernels for prompts: its own, and "cuda-tensor_cores", which runs on every GPU. That name
    also chooses the kernel that decodes, so float32 queries, which decode on another, come with the first alone."""
    device, _, variant = request.param.partition("-")
    if variant and "float32" in request.node.name:
        pytest.skip("prompts of float32 queries have one kernel")
    with force_kernel(variant) if variant else nullcontext():
        yield device


prefill_device = pytest.fixture(on_each_kernel, name="prefill_device")
hybrid_device = pytest.fixture(on_each_kernel, name="hybrid_device")


def pytest_report_header() -> list[str]:
    forced = os.environ.get("QUANTATTN_CPU_ISA", "none")
    return [f"pyquantattn {pyquantattn.__version__}: backends {pyquantattn.available_backends()}, forced ISA: {forced}"]


@pytest.fixture(autouse=True)
def _same_random_numbers_in_every_run() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def static_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build of the static library with its C++ tests and the sample runner."""
    return build_library(tmp_path_factory.mktemp("static"), "-DQATTN_BUILD_TESTS=ON", "-DQATTN_BUILD_TOOLS=ON")


@pytest.fixture
def cuda() -> str:
    """For tests of what only a GPU has: streams, graphs, several devices."""
    if not torch.cuda.is_available() or "cuda" not in pyquantattn.available_backends():
        pytest.skip("needs an NVIDIA GPU and a build with the CUDA backend")
    return "cuda"

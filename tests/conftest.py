"""Every test that takes `device` runs on every backend that this machine can run."""

from __future__ import annotations

import os

import pytest
import torch

import pyquantattn


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes: run with --slow"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", pyquantattn.available_backends())


def pytest_report_header() -> list[str]:
    forced = os.environ.get("QUANTATTN_CPU_ISA", "none")
    return [f"pyquantattn {pyquantattn.__version__}: backends {pyquantattn.available_backends()}, forced ISA: {forced}"]


@pytest.fixture
def cuda() -> str:
    """For tests of what only a GPU has: streams, graphs, several devices."""
    if not torch.cuda.is_available() or "cuda" not in pyquantattn.available_backends():
        pytest.skip("needs an NVIDIA GPU and a build with the CUDA backend")
    return "cuda"

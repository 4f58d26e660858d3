"""The C++ library as its users meet it: headers alone, an installed prefix, ctest."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEADERS = sorted([*(ROOT / "cpp/include/quantattn").glob("*.h"), *(ROOT / "cpp/formats").glob("*.h")])
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
PROGRAM = """
#include <cstdio>
#include <vector>
#include <quantattn/quantattn.h>

int main() {
  std::vector<uint16_t> codes(8 * 64), scale(8);
  std::vector<float> values(8 * 64, 2.5f);
  quantattn::CodecParams params;
  params.format = quantattn::KvFormat::kInt8;
  params.values = {values.data(), 0, 64, 0};
  params.codes = {codes.data(), 0, 64, 0};
  params.scale = {quantattn::ScaleGranularity::kTokenHead, scale.data(), 0, 1, 1};
  params.num_pages = params.num_heads = 1;
  params.page_size = 8;
  params.head_dim = 64;
  quantattn::quantize_kv(params, {});
  try {
    params.head_dim = 0;
    quantattn::quantize_kv(params, {});
  } catch (const quantattn::InvalidArgument& error) {
    std::printf("%s: first code %d, %s\\n", std::string(quantattn::version()).c_str(),
                static_cast<int>(reinterpret_cast<signed char*>(codes.data())[0]), error.what());
  }
}
"""
CMAKE_LISTS = """
cmake_minimum_required(VERSION 3.24)
project(consumer LANGUAGES CXX)
find_package(quantattn 0.1 REQUIRED)
add_executable(consumer main.cc)
target_link_libraries(consumer PRIVATE quantattn::quantattn)
"""


def run(*command, cwd=None, timeout=900):
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


def launcher():
    return ["-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"] if shutil.which("ccache") else []


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("header", HEADERS, ids=lambda h: h.name)
def test_every_header_compiles_alone(header, tmp_path):
    source = tmp_path / "alone.cc"
    name = f"quantattn/{header.name}" if header.parent.name == "quantattn" else f"formats/{header.name}"
    source.write_text(f'#include "{name}"\n#include "{name}"\n')
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror"]
    include = [f"-I{ROOT / 'cpp/include'}", f"-I{ROOT / 'cpp'}"]
    run(COMPILER, "-std=c++20", "-fsyntax-only", *warnings, *include, source)


def install(tmp_path, kind, *options):
    """Builds and installs the library; returns the prefix."""
    build, prefix = tmp_path / "build", tmp_path / "prefix"
    shared = "ON" if kind == "shared" else "OFF"
    configured = [f"-DBUILD_SHARED_LIBS={shared}", "-DQATTN_CUDA=OFF", "-DQATTN_BUILD_TOOLS=OFF", *launcher(), *options]
    run("cmake", "-G", "Ninja", "-S", ROOT, "-B", build, f"-DCMAKE_INSTALL_PREFIX={prefix}", *configured)
    run("cmake", "--build", build)
    run("cmake", "--install", build)
    return build, prefix


def consume(tmp_path, prefix):
    """A project of its own finds the installed library and runs."""
    project = tmp_path / "consumer"
    project.mkdir()
    (project / "main.cc").write_text(PROGRAM)
    (project / "CMakeLists.txt").write_text(CMAKE_LISTS)
    run("cmake", "-G", "Ninja", "-S", project, "-B", project / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", project / "build")
    output = run(project / "build/consumer")
    assert output == "0.1.0: first code 127, quantize_kv: head_dim must be at least 1, got 0\n"


@pytest.mark.timeout(900)
def test_static_library_ctest_and_installed_prefix(tmp_path):
    """One build: the C++ tests pass, the prefix holds public headers only, find_package works."""
    build, prefix = install(tmp_path, "static", "-DQATTN_BUILD_TESTS=ON")
    run("ctest", "--output-on-failure", cwd=build)
    installed = {p.name for p in (prefix / "include").rglob("*") if p.is_file()}
    assert installed == {p.name for p in (ROOT / "cpp/include/quantattn").iterdir()}
    consume(tmp_path, prefix)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_shared_library_in_an_installed_prefix(tmp_path):
    """Hidden symbols: what is not public is not exported."""
    _, prefix = install(tmp_path, "shared")
    consume(tmp_path, prefix)
    library = next(prefix.rglob("libquantattn.so"))
    symbols = run("nm", "-DC", "--defined-only", library)
    assert "quantattn::decode_attention(" in symbols
    assert "quantattn::cpu" not in symbols and "validate(quantattn::MergeParams" not in symbols

"""The C++ library as its users meet it: headers alone, an installed prefix, ctest."""

import os
import re
import shutil

import pytest
from cmake_build import ROOT, build_library, build_project, run

HEADERS = sorted([*(ROOT / "cpp/include/quantattn").glob("*.h"), *(ROOT / "cpp/formats").glob("*.h")])
PAGE = (ROOT / "docs/cpp.md").read_text()
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("header", HEADERS, ids=lambda h: h.name)
def test_every_header_compiles_alone(header, tmp_path):
    source = tmp_path / "alone.cc"
    name = f"quantattn/{header.name}" if header.parent.name == "quantattn" else f"formats/{header.name}"
    source.write_text(f'#include "{name}"\n#include "{name}"\n')
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror"]
    include = [f"-I{ROOT / 'cpp/include'}", f"-I{ROOT / 'cpp'}"]
    run(COMPILER, "-std=c++20", "-fsyntax-only", *warnings, *include, source)


def snippet(language):
    """The first snippet of docs/cpp.md in a language: "cpp" is its program, "cmake" the project around that."""
    found = re.search(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert found, f"docs/cpp.md has no {language} snippet"
    return found[1]


def install_and_consume(build, scratch):
    """The project of docs/cpp.md finds the installed library, and its program runs. Returns the prefix."""
    prefix, project = scratch / "prefix", scratch / "consumer"
    run("cmake", "--install", build, "--prefix", prefix)
    project.mkdir()
    (project / "first_program.cc").write_text(snippet("cpp"))
    (project / "CMakeLists.txt").write_text(snippet("cmake"))
    strict = "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror"
    consumer = build_project(project, project / "build", f"-DCMAKE_PREFIX_PATH={prefix}", strict)
    lines = run(consumer / "first_program").splitlines()
    promised = re.findall(r"^(sequence .*) \(kernel", PAGE, flags=re.MULTILINE)
    assert len(lines) == 2 and [line.partition(" (kernel")[0] for line in lines] == promised
    return prefix


@pytest.mark.timeout(900)
def test_the_cpp_tests_pass(static_build):
    run("ctest", "--output-on-failure", cwd=static_build)


@pytest.mark.timeout(900)
def test_static_library_in_an_installed_prefix(static_build, tmp_path):
    """The prefix holds the public headers and no others."""
    prefix = install_and_consume(static_build, tmp_path)
    installed = {p.name for p in (prefix / "include").rglob("*") if p.is_file()}
    assert installed == {p.name for p in (ROOT / "cpp/include/quantattn").iterdir()}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_shared_library_in_an_installed_prefix(tmp_path):
    """Hidden symbols: what is not public is not exported."""
    build = build_library(tmp_path / "build", "-DBUILD_SHARED_LIBS=ON", "-DQATTN_BUILD_TOOLS=OFF")
    prefix = install_and_consume(build, tmp_path)
    library = next(prefix.rglob("libquantattn.so"))
    symbols = run("nm", "-DC", "--defined-only", library)
    assert "quantattn::decode_attention(" in symbols
    assert "quantattn::cpu" not in symbols and "validate(quantattn::MergeParams" not in symbols


@pytest.mark.timeout(900)
def test_as_a_subdirectory_of_another_project(tmp_path):
    """`add_subdirectory` gives the same target, and builds neither tools nor tests: configured, not built."""
    lists = snippet("cmake").replace("find_package(quantattn 0.1 REQUIRED)", f"add_subdirectory({ROOT} quantattn)")
    (tmp_path / "CMakeLists.txt").write_text(lists)
    (tmp_path / "first_program.cc").write_text(snippet("cpp"))
    run("cmake", "-G", "Ninja", "-S", tmp_path, "-B", tmp_path / "build", "-DQATTN_CUDA=OFF")
    rules = (tmp_path / "build/build.ninja").read_text()
    assert "build first_program:" in rules and "build quantattn/libquantattn.a:" in rules
    assert "sample_runner" not in rules and "decode_test" not in rules

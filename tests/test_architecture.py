"""The arrows of docs/architecture.md, checked by reading every include and import."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Folder: prefixes of "..." includes that it may use, beside its own files.
ALLOWED_INCLUDES = {
    "cpp/include/quantattn": ["quantattn/"],
    "cpp/formats": ["quantattn/", "formats/"],
    "cpp/core": ["quantattn/", "core/", "generated/backends.def"],
    "cpp/cpu": ["quantattn/", "formats/", "core/backend.h", "core/fail.h", "cpu/"],
    "cuda": ["quantattn/", "formats/", "core/backend.h", "core/fail.h", "generated/"],
    "cpp/binding": ["quantattn/", "binding/"],
    "tests/cpp": ["quantattn/"],
}
SOURCES = (".h", ".cc", ".cuh", ".cu", ".cc.in", ".cu.in", ".def")


def sources_of(folder):
    files = [p for p in sorted((ROOT / folder).rglob("*")) if p.name.endswith(SOURCES)]
    assert files, f"{folder} has no sources"
    return files


def includes_of(path):
    return re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', path.read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("folder", ALLOWED_INCLUDES)
def test_includes_follow_the_arrows(folder):
    bad = []
    for path in sources_of(folder):
        for kind, name in includes_of(path):
            is_own = (ROOT / folder / name).is_file() or (path.parent / name).is_file()
            if kind == '"' and not is_own and not name.startswith(tuple(ALLOWED_INCLUDES[folder])):
                bad.append(f"{path.relative_to(ROOT)} includes {name}")
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("folder", [*ALLOWED_INCLUDES, "tools/sample_runner"])
def test_no_torch_and_python_only_in_the_binding(folder):
    bad = []
    for path in sources_of(folder):
        for _, name in includes_of(path):
            if re.match(r"(torch|ATen|c10)/", name):
                bad.append(f"{path.relative_to(ROOT)} includes {name}")
            if re.match(r"Python\.h|pybind11/", name) and folder != "cpp/binding":
                bad.append(f"{path.relative_to(ROOT)} includes {name}")
    assert not bad, "\n".join(bad)


def test_the_sample_runner_is_a_user_like_any_other():
    """It includes public headers and its own files, nothing of the library's inside."""
    own = {p.name for p in (ROOT / "tools/sample_runner").rglob("*")}
    for path in sources_of("tools/sample_runner"):
        for kind, name in includes_of(path):
            assert kind == "<" or name.startswith("quantattn/") or Path(name).name in own, f"{path.name}: {name}"


@pytest.mark.parametrize(
    "folder", ["cpp/include/quantattn", "cpp/formats", "cpp/core", "cpp/cpu", "cpp/binding", "cuda"]
)
def test_the_library_never_prints_exits_or_aborts(folder):
    forbidden = re.compile(r"\b(printf|fprintf|puts|abort|_?exit|terminate)\s*\(|std::c(out|err|log)\b|\bassert\s*\(")
    bad = []
    for path in sources_of(folder):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if forbidden.search(line.split("//")[0]):
                bad.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not bad, "\n".join(bad)


def test_cuda_sources_never_wait_for_the_device():
    """F3: no hidden synchronisation."""
    waits = re.compile(r"cuda(Device|Stream|Event)Synchronize|cudaMemcpy\s*\(")
    bad = [p.name for p in sources_of("cuda") if waits.search(p.read_text())]
    assert not bad, bad


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize(
    "folder,others",
    [("pyquantattn", {"torch", "numpy", "pyquantattn", "typing_extensions"}), ("tests/oracle", {"numpy"})],
)
def test_imports_follow_the_arrows(folder, others):
    """The package needs torch and numpy alone; the reference shares nothing with what it checks. The evaluation tool
    and the integrations are extras, which the rest does not import, and may need more."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        if {"evaluation", "integrations"} & set(path.relative_to(ROOT).parts):
            continue
        strangers = set(imports_of(path)) - others - sys.stdlib_module_names
        assert not strangers, f"{path.relative_to(ROOT)} imports {strangers}"


def test_the_reference_uses_no_cast_of_torch_and_no_float16_of_numpy():
    for path in sorted((ROOT / "tests/oracle").glob("*.py")):
        assert not re.search(r"np\.float16|ml_dtypes|import torch", path.read_text()), path.name


def test_files_stay_readable():
    """STYLE: fewer than 400 lines."""
    folders = ["cpp", "cuda", "pyquantattn", "tests", "tools", "cmake"]
    files = [p for f in folders for p in (ROOT / f).rglob("*") if p.name.endswith((*SOURCES, ".py", ".cmake"))]
    long = [f"{p.relative_to(ROOT)}: {n}" for p in files if (n := len(p.read_text().splitlines())) >= 400]
    assert len(files) > 50 and not long, "\n".join(long)


def test_a_format_is_one_row_and_one_header():
    """Every format of the table has its header, its twin in the reference, and its row in docs/formats.md."""
    import oracle

    table = (ROOT / "cpp/include/quantattn/kv_formats.def").read_text()
    names = re.findall(r'^QATTN_KV_FORMAT\(\w+, "(\w+)"', table, flags=re.MULTILINE)
    assert sorted(names) == sorted(oracle.FORMATS)
    document = (ROOT / "docs/formats.md").read_text()
    for name in names:
        assert (ROOT / f"cpp/formats/{name}.h").is_file() and f"`{name}`" in document, name

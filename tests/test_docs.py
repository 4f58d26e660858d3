"""Documentation that is executed: Python snippets, links, commands, and the doctor."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyquantattn

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def named(documents):
    return pytest.mark.parametrize("document", documents, ids=lambda d: d.name)


def snippets(document, language):
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), flags=re.MULTILINE | re.DOTALL)


@named([d for d in DOCUMENTS if snippets(d, "python")])
def test_python_snippets_run(document, capsys, monkeypatch):
    """In order, in one namespace, as a reader would paste them at the root of the repository."""
    monkeypatch.chdir(ROOT)
    for module in re.findall(r"^(?:from|import) (\w+)", "\n".join(snippets(document, "python")), flags=re.MULTILINE):
        pytest.importorskip(module, reason=f"{document.name} needs {module}, an extra")
    namespace: dict = {}
    for number, code in enumerate(snippets(document, "python"), 1):
        exec(compile(code, f"{document.name} snippet {number}", "exec"), namespace)
    assert "error" not in capsys.readouterr().err.lower()


def test_the_readme_has_a_first_call():
    assert any("decode_attention" in code for code in snippets(ROOT / "README.md", "python"))


@named(DOCUMENTS)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


@named(DOCUMENTS)
def test_commands_and_paths_exist(document):
    """`make x` has a rule; `python tools/x.py` and `bash x` have a file."""
    text, makefile = document.read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (?:[A-Z]+=\S+ )*(\w+)", text, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"make {target}"
    for script in re.findall(r"(?:python|bash) ((?:tools|\.ci)/[\w./]+)", text):
        assert (ROOT / script).is_file(), f"{document.name} runs {script}"


def test_public_names_are_documented():
    """Every exported function: a docstring with an example."""
    for name in pyquantattn.__all__:
        documentation = getattr(pyquantattn, name).__doc__
        assert documentation, name
        if name not in ("UnsupportedError", "LastKernel"):
            assert ">>>" in documentation, f"{name} has no example"


def run(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, **options)


def test_the_doctor_says_what_was_built_and_what_runs():
    result = run("-m", "pyquantattn.doctor")
    assert result.returncode == 0, result.stderr
    for word in ("cpu", "scalar", "int8", pyquantattn.__version__):
        assert word in result.stdout, f"{word} is missing from:\n{result.stdout}"


def test_without_torch_the_import_says_what_to_do():
    result = run("-c", "import sys; sys.modules['torch'] = None; import pyquantattn")
    assert result.returncode != 0
    assert "pyquantattn needs PyTorch" in result.stderr and "pip install torch" in result.stderr, result.stderr


def test_the_extension_links_no_torch():
    from pyquantattn import _core

    result = subprocess.run(["ldd", _core.__file__], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "libc.so" in result.stdout
    assert not re.search(r"lib(torch|c10|python)", result.stdout), result.stdout  # an address may hold "c10"

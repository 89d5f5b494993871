"""`hubert_fast.extension`: what was built, and one sentence where something was not."""

import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES

import pytest

from hubert_fast import extension, source_tree
from tests.build.repository import ROOT

ABSENT = (
    "from hubert_fast import extension as e; assert e.cpu() is e.cuda() is e.facts() is None; print(e.why_not('cuda'))"
)


def _package_with(folder, files):
    """What the absence of the extension is said to be in a ``hubert_fast`` with nothing but what asks for it and ``files``."""
    package = folder / "hubert_fast"
    package.mkdir()
    (package / "__init__.py").touch()
    for module in (extension, source_tree):
        shutil.copy(module.__file__, package)
    for name, contents in files.items():
        (package / name).write_text(contents)
    # -S: what finds the modules of an editable install would find its _C.
    done = subprocess.run([sys.executable, "-S", "-c", ABSENT], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert ("UserWarning" in done.stderr) == ("built from other sources" in done.stdout)
    return done.stdout


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "was not built (HUBERT_FAST_BUILD=0"),
        ({f"_C{EXTENSION_SUFFIXES[0]}": "not a library"}, "cannot be loaded ("),
        (
            {"_C.cpython-39-x86_64-linux-gnu.so": ""},
            "built for another Python (_C.cpython-39-x86_64-linux-gnu.so, not _C",
        ),
        ({"_C.py": "interface = -1"}, "built from other sources (interface -1, not "),
        ({"_C.py": ""}, "built from other sources (interface None, not "),
    ],
)
def test_an_extension_that_cannot_be_used_is_absent_and_the_reason_is_said(tmp_path, files, expected):
    assert expected in _package_with(tmp_path, files)


def test_a_part_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="'cpu' or 'cuda'; got 'tpu'"):
        extension.why_not("tpu")


def test_built_extension_has_its_parts_or_says_why_not():
    facts = extension.facts()
    if facts is None:
        pytest.skip(extension.why_not("cpu"))
    assert extension.cpu().instruction_set() in facts["cpu_variants"]
    assert extension.why_not("cpu") is None
    assert (extension.cuda() is None) == (facts["cuda"] is None) == (facts["cuda_archs"] == [])
    assert extension.why_not("cuda") == (
        facts["cuda_why_not"] and f"the extension was built without CUDA: {facts['cuda_why_not']}"
    )


def test_info_says_what_was_built(capsys):
    from hubert_fast.cli import main

    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    facts = extension.facts()
    if facts is None:
        assert f"extension: none, {extension.why_not('cpu')}" in printed
        return
    assert f"extension: built by {facts['compiler']}" in printed
    assert f"in use: {extension.cpu().instruction_set()}" in printed
    assert f"CUDA {facts['cuda']}" in printed if facts["cuda"] else extension.why_not("cuda") in printed


def test_info_refuses_what_it_does_not_know(capsys):
    from hubert_fast.cli import main

    assert main(["info", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: hubert-fast info")
    assert main(["info", "cuda"]) == 2
    assert "unrecognized arguments: cuda" in capsys.readouterr().err


def test_the_interface_is_the_same_number_in_python_and_in_cpp():
    assert f"interface_version = {extension.INTERFACE};" in (ROOT / "csrc" / "bindings.h").read_text()

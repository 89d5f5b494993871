"""`hubert_fast.source_tree`: which copy of the package and of what lies beside it runs."""

import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES

import pytest

from tests.build.repository import ROOT


@pytest.fixture
def tree(tmp_path):
    """A source tree in which nothing was built."""
    folder = tmp_path / "tree"
    folder.mkdir()
    for name in ("kernels", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "hubert_fast").mkdir()
    for path in (ROOT / "hubert_fast").iterdir():
        if not path.name.startswith("_C."):
            (folder / "hubert_fast" / path.name).symlink_to(path)
    return folder


def _python(tree, script, path=""):
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tree,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(path)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_a_source_tree_takes_its_own_kernels_and_benchmarks_whatever_is_installed(tree):
    script = (
        "import hubert_fast.kernels\n"
        "import hubert_fast.benchmarks.command_line as benchmarks\n"
        "print(hubert_fast.__file__, hubert_fast.kernels.__file__, benchmarks.__file__, sep='\\n')"
    )
    files = _python(tree, script).stdout.split()
    assert [each.removeprefix(f"{tree}/").split("/")[0] for each in files] == ["hubert_fast", "kernels", "benchmarks"]


def test_a_source_tree_without_the_extension_that_an_installed_copy_has_says_so_once(tree, tmp_path):
    installed = tmp_path / "site-packages"
    (installed / "hubert_fast").mkdir(parents=True)
    library = installed / "hubert_fast" / f"_C{EXTENSION_SUFFIXES[0]}"
    library.touch()
    (installed / "hubert_fast-1.0.dist-info").mkdir()
    (installed / "hubert_fast-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: hubert-fast\nVersion: 1.0\n"
    )
    script = "from hubert_fast import extension\nprint(extension.why_not('cpu'), extension.why_not('cpu'), sep='\\n')"
    done = _python(tree, script, installed)
    first, second = done.stdout.splitlines()
    assert first == second and f"hubert_fast runs from {tree}/hubert_fast, where nothing was built" in first
    assert first.endswith(f"the installed copy has {library}")
    assert done.stderr.count("UserWarning") == 1 and "pip install -e ." in done.stderr


def test_the_extension_of_another_copy_is_not_taken(tree):
    _python(tree, "from hubert_fast import extension\nassert extension.cpu() is None, extension.cpu()")

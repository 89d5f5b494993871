import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from hubert_fast.pretrain.atomic import atomic_path, write_text, write_with


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_text(path, "text"),
        lambda path: write_with(path, lambda target: torch.save({}, target)),
        lambda path: write_with(path, lambda target: save_file({"a": torch.zeros(1)}, target)),
    ],
)
def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask, write):
    write(tmp_path / "file.bin")
    assert stat.S_IMODE((tmp_path / "file.bin").stat().st_mode) == 0o666 & ~umask


def test_a_file_is_replaced_whole_or_stays(tmp_path):
    target = tmp_path / "deep" / "file.tar.gz"
    write_text(target, "old")
    with pytest.raises(RuntimeError, match="half way"):
        with atomic_path(target) as temporary:
            assert temporary.parent == target.parent and temporary.name.endswith("file.tar.gz")
            temporary.write_text("ne")
            raise RuntimeError("half way")
    assert target.read_text() == "old" and list(target.parent.iterdir()) == [target]
    write_text(target, "new")
    assert target.read_text() == "new" and list(target.parent.iterdir()) == [target]

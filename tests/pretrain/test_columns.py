import errno
import json
import os
import pickle

import numpy as np
import pytest
from safetensors.numpy import load_file

from hubert_fast.pretrain.columns import Columns, DamagedFileError, Strings, new_columns, write_columns

COLUMNS = {
    "a": np.arange(5, dtype=np.int16),
    "b": np.linspace(0, 1, 3),
    "c": np.arange(4, dtype=np.int64),
    "d": np.zeros(0, np.uint8),
}


@pytest.fixture
def path(tmp_path):
    write_columns(tmp_path / "x.safetensors", COLUMNS, {"made of": "ü"})
    return tmp_path / "x.safetensors"


def test_what_is_written_is_read_and_any_reader_of_safetensors_opens_it(path):
    columns = Columns(path)
    columns.verify()
    assert set(columns) == set(COLUMNS) and columns.metadata == {"made of": "ü"}
    by_library = load_file(path)
    for name, expected in COLUMNS.items():
        for found in (columns[name], by_library[name]):
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected)
        assert not columns[name].flags.writeable and columns[name].flags.aligned


def test_equal_content_has_an_equal_hash_and_other_content_another(path, tmp_path):
    write_columns(tmp_path / "y.safetensors", COLUMNS, {"made of": "ü"})
    assert (tmp_path / "y.safetensors").read_bytes() == path.read_bytes()
    write_columns(tmp_path / "z.safetensors", COLUMNS, {"made of": "u"})
    assert Columns(tmp_path / "z.safetensors").sha256 != Columns(path).sha256


def test_every_bit_that_flips_is_found(path):
    good = path.read_bytes()
    found = 0
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(DamagedFileError, match="x.safetensors cannot be read: .*made anew once it is deleted"):
            Columns(path).verify()
        found += 1
    assert found == len(good)


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 100, b"\x02" + bytes(7) + b"[]", b"\x10" + bytes(7) + b'{"a": {}}       ']
)
def test_another_file_is_named_and_not_read(path, content):
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match="x.safetensors cannot be read"):
        Columns(path)


@pytest.mark.parametrize("change", [lambda good: good[:-1], lambda good: good + b"x"])
def test_a_file_that_is_cut_short_or_goes_on_is_refused(path, change):
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DamagedFileError, match="its header says .* bytes, it has"):
        Columns(path)


def test_columns_that_lie_elsewhere_are_refused(path):
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    header["a"]["data_offsets"] = [0, 10**9]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + good[8 + length :])
    with pytest.raises(DamagedFileError):
        Columns(path)


def test_a_block_that_fails_leaves_the_file_before_it(path):
    before = path.read_bytes()
    with pytest.raises(KeyError), new_columns(path, {"a": (np.int64, 3)}, {}) as file:
        file.put("a", np.ones(3))
        raise KeyError
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_columns_are_written_in_pieces_and_what_is_not_is_0(path):
    with new_columns(path, {"a": (np.int16, 5), "b": (np.float64, 2)}, {}) as file:
        file.put("a", np.array([7, 8]), 3)
        file.put("b", np.array([0.5]), 1)
        file.put("a", np.array([9]))
    columns = Columns(path)
    columns.verify()
    assert columns["a"].tolist() == [9, 0, 0, 7, 8] and columns["b"].tolist() == [0, 0.5]


def test_a_full_disk_is_found_before_anything_is_written(path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        write_columns(path, COLUMNS, {})
    assert Columns(path).metadata and list(path.parent.iterdir()) == [path]


def test_strings_of_any_length_and_script():
    texts = ["", "a/b.wav", "ñ/語.flac", "", "x" * 1000]
    strings = Strings.of(texts)
    assert list(strings) == [strings[index] for index in range(len(strings))] == texts
    assert list(Strings.of([])) == []
    assert list(pickle.loads(pickle.dumps(strings))) == texts

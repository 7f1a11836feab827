"""Files that are put in their place whole."""

import pytest

from pipeline.errors import UsageError
from pipeline.places import placed, put


def test_the_new_file_takes_the_place_of_the_old_one(tmp_path):
    put(tmp_path / "a", b"old")
    put(tmp_path / "a", b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"new")]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    put(tmp_path / "a", b"old")
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        put(tmp_path / "a", b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"old")]


def test_a_name_of_255_bytes(tmp_path):
    put(tmp_path / "deep" / ("x" * 255), b"new")
    assert [p.read_bytes() for p in (tmp_path / "deep").iterdir()] == [b"new"]


def test_an_address_of_another_kind_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="gs://"):
        placed("gs://bucket/out")
    assert placed("out") == tmp_path / "out"

"""Files that are put in their place whole."""

import pytest

from pipeline.aside import aside


def test_the_new_file_takes_the_place_of_the_old_one(tmp_path):
    (tmp_path / "a").write_text("old")
    with aside(tmp_path / "a") as part:
        part.write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "new")]


def written_by_half(path) -> None:
    with aside(path) as part:
        part.write_text("ne")
        raise OSError("full")


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match="full"):
        written_by_half(tmp_path / "a")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]


def test_a_name_of_255_bytes(tmp_path):
    with aside(tmp_path / ("x" * 255)) as part:
        part.write_text("new")
    assert len(list(tmp_path.iterdir())) == 1

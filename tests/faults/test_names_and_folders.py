"""Rows 38-48 of the fault matrix: what file systems hold besides slides with decent names."""

import os
import shutil
from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.folder import find_slides
from pipeline.outcome import read_outcomes

ODD_NAMES = {
    "row_38_space": "a slide.svs",
    "row_38_unicode": "Präparat 切片 é.svs",
    "row_38_decomposed_unicode": "e\u0301.svs",
    "row_38_emoji": "\U0001f52c.svs",
    "row_38_quotes": 'it\'s "quoted".svs',
    "row_38_comma_and_semicolon": "a,b;c.svs",
    "row_38_hash_and_percent": "#1 100%.svs",
    "row_38_pattern": "[x]*?.svs",
    "row_38_backslash": "a\\b.svs",
    "row_38_dash_first": "-o.svs",
    "row_38_looks_like_a_formula": "=1+1.svs",
    "row_38_upper_case": "A.SVS",
    "row_39_newline": "a\nb.svs",
    "row_39_carriage_return": "a\r\nb.svs",
    "row_40_double_colon": "a::b.svs",
    "row_40_url": "file::zip:b.svs",
    "row_41_not_utf8": os.fsdecode(b"caf\xe9.svs"),
    "row_42_of_255_bytes": "x" * 251 + ".svs",
    "row_42_of_255_bytes_unicode": "é" * 125 + "x.svs",
    "row_42_of_255_bytes_not_utf8": os.fsdecode(b"\xe9" * 251 + b".svs"),
}
FAULT = {
    38: ("names with spaces, unicode, quotes, #, [x]*", "D"),
    39: ("a newline in a name", "D, the csv quotes it"),
    40: ("a::b.svs", "D"),
    41: ("a name that is not UTF-8", "D"),
    42: ("a name of 255 bytes", "D, its folder is named by a hash"),
}


@pytest.fixture
def slide(neighbour) -> Path:
    return neighbour[0]


def put(slide: Path, *places: Path) -> None:
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(slide, place)


def marked(names: dict[str, str]) -> list:
    rows = {key: int(key.split("_")[1]) for key in names}
    return [
        pytest.param(name, id=key, marks=pytest.mark.fault(rows[key], *FAULT[rows[key]])) for key, name in names.items()
    ]


@pytest.mark.parametrize("name", marked(ODD_NAMES))
def test_odd_name(name, slide, folder, line, neighbour):
    put(slide, folder / name)
    assert list(find_slides(folder).files) == [name]
    assert list(find_slides(folder / name).files) == [name]
    rows = line.folder(folder)
    assert rows[name].status == "done"
    assert line.x(name) == neighbour[1]
    assert line.store.slides() == [name]
    assert line.folder(folder)[name].seconds is None, "the second run finds it finished"


@pytest.mark.fault(38)
@pytest.mark.fault(39)
@pytest.mark.fault(40)
@pytest.mark.fault(41)
@pytest.mark.fault(42)
def test_odd_names_do_not_meet(slide, folder, line):
    put(slide, *(folder / name for name in ODD_NAMES.values()))
    names = {os.path.join("deep é", name) for name in ODD_NAMES.values()}
    put(slide, *(folder / name for name in names))
    rows = line.folder(folder)
    assert rows.keys() == {*ODD_NAMES.values(), *names}
    assert {row.status for row in rows.values()} == {"done"}
    assert sorted(line.store.slides()) == sorted(rows)
    assert {row.slide for row in read_outcomes(line.out / "slides.csv")} == rows.keys()


@pytest.mark.fault(38)
def test_row_38_a_name_that_is_a_pattern_is_a_name(slide, folder):
    put(slide, folder / "[x]*.svs", folder / "x1.svs")
    assert list(find_slides(folder / "[x]*.svs").files) == ["[x]*.svs"]


@pytest.mark.fault(43, "the same name in two folders", "D twice")
def test_row_43_same_name_in_two_folders(slide, kit, folder, line, neighbour):
    put(slide, folder / "one/a.svs")
    put(kit.good, folder / "two/a.svs")
    rows = line.folder(folder)
    assert {name: row.status for name, row in rows.items()} == {"one/a.svs": "done", "two/a.svs": "done"}
    assert line.x("one/a.svs") == neighbour[1]
    assert line.x("two/a.svs") != neighbour[1]


@pytest.mark.fault(43)
def test_row_43_a_slide_in_a_folder_with_the_name_of_another(slide, folder, line):
    put(slide, folder / "a.svs", folder / "a/b.svs", folder / "a.svs.zarr.svs")
    assert {row.status for row in line.folder(folder).values()} == {"done"}


@pytest.mark.fault(44, "dangling link, loop of links", "F")
def test_row_44_dangling_and_looping_links(slide, folder, line):
    put(slide, folder / "good.svs")
    (folder / "dangling.svs").symlink_to(folder / "nothing.svs")
    (folder / "loop.svs").symlink_to(folder / "loop.svs")
    (folder / "loop").symlink_to(folder / "loop")
    rows = line.folder(folder)
    assert {name: row.status for name, row in rows.items()} == {
        "dangling.svs": "failed",
        "good.svs": "done",
        "loop.svs": "failed",
    }
    assert "no such file" in rows["dangling.svs"].message
    assert "loop of links" in rows["loop.svs"].message


@pytest.mark.fault(45, "link to the parent", "no slide twice")
@pytest.mark.parametrize("pattern", ["", "**/*.svs"], ids=["folder", "glob"])
def test_row_45_link_to_the_parent(pattern, slide, folder):
    put(slide, folder / "a.svs", folder / "deep/b.svs")
    (folder / "deep/up").symlink_to("..")
    found = find_slides(str(folder / pattern))
    assert (sorted(found.files), found.root) == (["a.svs", "deep/b.svs"], folder)


@pytest.mark.fault(45)
@pytest.mark.parametrize("pattern", ["", "**/*.svs"], ids=["folder", "glob"])
def test_row_45_overlapping_loops_of_links(pattern, slide, folder):
    put(slide, folder / "one/a.svs", folder / "two/b.svs")
    (folder / "one/other").symlink_to("../two")
    (folder / "two/other").symlink_to("../one")
    (folder / "two/self").symlink_to(".")
    found = find_slides(str(folder / pattern)).files
    assert sorted(os.path.realpath(path) for path in found.values()) == [
        str(folder / "one/a.svs"),
        str(folder / "two/b.svs"),
    ]


@pytest.mark.fault(45)
def test_row_45_a_link_into_another_disk_is_followed(slide, folder, tmp_path):
    put(slide, tmp_path / "elsewhere/a.svs")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "b.svs").symlink_to(tmp_path / "elsewhere/a.svs")
    assert sorted(find_slides(folder).files) == ["b.svs", "linked/a.svs"]


@pytest.mark.fault(46, "FIFO", "not listed; F where named")
def test_row_46_fifo(slide, folder, line):
    put(slide, folder / "good.svs")
    os.mkfifo(folder / "pipe.svs")
    os.mkfifo(folder / "pipe")
    assert list(find_slides(folder).files) == ["good.svs"]
    assert sorted(find_slides(str(folder / "*")).files) == ["good.svs"]
    row = line({"pipe.svs": folder / "pipe.svs"})["pipe.svs"]
    assert (row.status, row.stage) == ("failed", "open")
    assert "not a regular file" in row.message


@pytest.mark.fault(47, "folder named a.svs", "not listed; F where named")
def test_row_47_folder_named_as_a_slide(slide, folder, line):
    put(slide, folder / "good.svs")
    (folder / "a.svs").mkdir()
    assert list(find_slides(folder).files) == ["good.svs"]
    assert list(find_slides(str(folder / "*.svs")).files) == ["good.svs"]
    row = line({"a.svs": folder / "a.svs"})["a.svs"]
    assert (row.status, row.message) == ("failed", "it is a directory")


@pytest.mark.fault(48, "no permission", "F; P for the folder of all slides")
def test_row_48_slide_that_may_not_be_read(slide, open_folder, as_nobody, line):
    put(slide, open_folder / "slides/closed.svs", open_folder / "slides/good.svs")
    (open_folder / "slides/closed.svs").chmod(0)
    (open_folder / "out").mkdir()
    (open_folder / "out").chmod(0o777)
    line = type(line)(open_folder / "out", open_folder / "slides")
    with as_nobody():
        rows = line.folder(open_folder / "slides")
    assert rows["good.svs"].status == "done"
    assert (rows["closed.svs"].status, rows["closed.svs"].stage) == ("failed", "open")
    assert "no permission" in rows["closed.svs"].message


@pytest.mark.fault(48)
def test_row_48_folder_that_may_not_be_listed(slide, open_folder, as_nobody):
    put(slide, open_folder / "slides/a.svs")
    (open_folder / "slides").chmod(0)
    with as_nobody(), pytest.raises(UsageError, match="no permission to list"):
        find_slides(open_folder / "slides")


@pytest.mark.fault(48)
def test_row_48_folder_inside_that_may_not_be_listed(slide, open_folder, as_nobody):
    """Its slides are not left out quietly, and it is no reason to refuse the others: disks have a lost+found."""
    put(slide, open_folder / "slides/good.svs", open_folder / "slides/closed/a.svs")
    (open_folder / "slides/closed").chmod(0)
    with as_nobody():
        found = find_slides(open_folder / "slides")
    assert list(found.files) == ["good.svs"]
    assert [(row.slide, row.status, row.message) for row in found.skipped] == [
        ("closed", "skipped", "no permission to list this folder")
    ]


@pytest.mark.fault(51, "slide removed", "F")
def test_row_51_slide_removed_after_it_was_listed(slide, folder, line, neighbour):
    put(slide, folder / "gone.svs", folder / "good.svs")
    files = find_slides(folder).files
    (folder / "gone.svs").unlink()
    rows = line(files)
    assert (rows["gone.svs"].status, rows["gone.svs"].message) == ("failed", "there is no such file")
    assert line.x("good.svs") == neighbour[1]

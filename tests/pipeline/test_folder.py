"""From what the user names to the slides that are meant."""

import os

import pytest

from pipeline import folder as module
from pipeline.errors import UsageError
from pipeline.folder import EXTENSIONS, find_slides, is_candidate

TIFF = b"II*\0" + bytes(200)


def make(root, *names, content=TIFF):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def names(source, out=None):
    return list(find_slides(source, out).files)


def test_identity_is_the_path_relative_to_the_folder(tmp_path):
    make(tmp_path, "case1/a.svs", "case2/a.svs", "b.ndpi", "case1/deep/er/c.TIFF")
    found = find_slides(tmp_path)
    assert found.root == tmp_path
    assert found.files == {
        name: tmp_path / name for name in ("b.ndpi", "case1/a.svs", "case1/deep/er/c.TIFF", "case2/a.svs")
    }
    assert list(found.files) == sorted(found.files)
    assert found.skipped == ()


def test_a_relative_folder_gives_the_same(tmp_path, monkeypatch):
    make(tmp_path, "slides/a.svs")
    monkeypatch.chdir(tmp_path)
    for spelling in ("slides", "slides/", "./slides/../slides"):
        assert find_slides(spelling) == find_slides(tmp_path / "slides")


@pytest.mark.parametrize(
    "name", [f"a{extension}" for extension in sorted(EXTENSIONS)] + ["A.SVS", "x.y.z.svs", "a.svs.gz"]
)
def test_known_extensions_are_candidates_whatever_is_in_them(tmp_path, name):
    make(tmp_path, name, content=b"not a slide at all")
    assert names(tmp_path) == [name], "a bad slide is told by its reader, not passed over"


@pytest.mark.parametrize("name", ["a.txt", "a.csv", ".a.svs", "._a.svs", "readme", "a.gz", "a.xml"])
def test_other_files_are_not(tmp_path, name):
    make(tmp_path, name, "b.svs", content=b"some text")
    assert names(tmp_path) == ["b.svs"]


@pytest.mark.parametrize(
    ("content", "is_slide"),
    [(TIFF, True), (bytes(128) + b"DICM", True), (b"\x89PNG\r\n", True), (b"%PDF", False), (b"", False)],
)
def test_files_without_extension_go_by_their_first_bytes(tmp_path, content, is_slide):
    make(tmp_path, "slide", content=content)
    assert is_candidate(tmp_path / "slide") == is_slide


def test_folders_and_pipes_are_no_slides(tmp_path):
    (tmp_path / "folder.svs").mkdir()
    os.mkfifo(tmp_path / "pipe.svs")
    os.mkfifo(tmp_path / "pipe")
    assert not any(is_candidate(path) for path in tmp_path.iterdir())
    with pytest.raises(UsageError, match="no slide in it"):
        find_slides(tmp_path)


def test_a_dangling_link_is_told_and_not_passed_over(tmp_path):
    (tmp_path / "a.svs").symlink_to(tmp_path / "gone.svs")
    (tmp_path / "loop.svs").symlink_to(tmp_path / "loop.svs")
    (tmp_path / "notes.txt").symlink_to(tmp_path / "gone.txt")
    assert names(tmp_path) == ["a.svs", "loop.svs"]


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    make(tmp_path, "slides/x/a.svs", "elsewhere/b.svs")
    (tmp_path / "slides/x/up").symlink_to(tmp_path / "slides")
    (tmp_path / "slides/more").symlink_to(tmp_path / "elsewhere")
    assert names(tmp_path / "slides") == ["more/b.svs", "x/a.svs"]


def test_stores_hidden_folders_and_the_output_are_not_searched(tmp_path):
    make(tmp_path, "a.svs", "x.zarr/b.png", ".cache/c.svs", "out/qc/a.svs.png", "other/d.png")
    assert names(tmp_path, tmp_path / "out") == ["a.svs", "other/d.png"]
    assert names(tmp_path) == ["a.svs", "other/d.png", "out/qc/a.svs.png"]


def test_the_parts_of_a_mirax_slide_are_not_slides(tmp_path):
    make(tmp_path, "a.mrxs", "a/Data0001.dat", "a/preview.jpg", "b/c.jpg")
    assert names(tmp_path) == ["a.mrxs", "b/c.jpg"]


def test_the_images_of_a_hamamatsu_index_are_not_slides(tmp_path):
    make(tmp_path, "a_0.jpg", "a_1.jpg", "other.jpg")
    (tmp_path / "a.vms").write_text("[Virtual Microscope Specimen]\nImageFile=a_0.jpg\nImageFile(1,0)=a_1.jpg\n")
    assert names(tmp_path) == ["a.vms", "other.jpg"]


def test_one_file_is_named_by_its_name(tmp_path):
    make(tmp_path, "case/a.xyz")
    found = find_slides(tmp_path / "case/a.xyz")
    assert found.files == {"a.xyz": tmp_path / "case/a.xyz"}, "whatever its extension, as it was named"
    assert found.root == tmp_path / "case"


@pytest.mark.parametrize(
    ("pattern", "root", "expected"),
    [
        ("slides/*.svs", "slides", ["a.svs"]),
        ("slides/**/*.svs", "slides", ["a.svs", "case1/b.svs", "case2/b.svs"]),
        ("slides/case*/b.svs", "slides", ["case1/b.svs", "case2/b.svs"]),
        ("slides/case[12]/*", "slides", ["case1/b.svs", "case2/b.svs"]),
        ("sl?des/a.svs", ".", ["slides/a.svs"]),
    ],
)
def test_globs_are_relative_to_their_fixed_prefix(tmp_path, pattern, root, expected):
    make(tmp_path, "slides/a.svs", "slides/case1/b.svs", "slides/case2/b.svs", "slides/case2/n.txt")
    found = find_slides(str(tmp_path / pattern))
    assert found.root == tmp_path / root
    assert list(found.files) == expected
    assert all(found.files[name] == found.root / name for name in expected)


def test_a_name_with_glob_characters_that_exists_is_that_file(tmp_path):
    make(tmp_path, "a[1].svs", "a1.svs")
    assert names(tmp_path / "a[1].svs") == ["a[1].svs"]


def test_a_table_of_slides(tmp_path):
    make(tmp_path, "slides/a.svs", "slides/sub/b.anything", "slides/c.svs")
    table = tmp_path / "slides/list.csv"
    table.write_text("slide,label\nsub/b.anything,1\na.svs,0\nmissing.svs,0\n")
    found = find_slides(table)
    assert found.root == tmp_path / "slides"
    assert set(found.files) == {"sub/b.anything", "a.svs", "missing.svs"}, "a missing one becomes a failed row"
    assert found.files["a.svs"] == tmp_path / "slides/a.svs"


@pytest.mark.parametrize(
    ("rows", "words"), [("../a.svs", "outside"), ("a.svs\n./a.svs", "twice"), ("/etc/passwd", "outside")]
)
def test_tables_that_cannot_give_identities(tmp_path, rows, words):
    (tmp_path / "list.csv").write_text(f"slide\n{rows}\n")
    with pytest.raises(UsageError, match=words):
        find_slides(tmp_path / "list.csv")


@pytest.mark.parametrize("source", ["nothing", "nothing.svs", "no*.svs", "nothing.csv"])
def test_nothing_there(tmp_path, source):
    with pytest.raises(UsageError, match=r"[Nn]o such|no slide"):
        find_slides(str(tmp_path / source))


def test_files_of_one_dicom_series_are_one_slide(tmp_path, monkeypatch):
    make(tmp_path, "d/1.dcm", "d/2.dcm", "d/3.dcm", "e/1.dcm", "e/2.dcm", content=bytes(128) + b"DICM")
    make(tmp_path, "a.svs", "text.dcm")
    ids = {
        "d/1.dcm": ("series", "one"),
        "d/2.dcm": ("series", "two"),
        "d/3.dcm": None,
        "e/1.dcm": ("series", "one"),  # a copy of the first is no part of it
        "e/2.dcm": ("other", "three"),
    }
    monkeypatch.setattr("pipeline.readers.openslide.series", lambda path: ids[str(path.relative_to(tmp_path))])
    found = find_slides(tmp_path)
    assert list(found.files) == ["a.svs", "d/1.dcm", "d/3.dcm", "e/1.dcm", "e/2.dcm", "text.dcm"]
    assert [(row.slide, row.status, row.message) for row in found.skipped] == [
        ("d/2.dcm", "skipped", "part of d/1.dcm")
    ]


def test_a_folder_that_may_not_be_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(module.os, "access", lambda *_: False)
    with pytest.raises(UsageError, match="permission"):
        find_slides(tmp_path)

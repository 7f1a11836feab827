"""Tables as people write them, and which slide a cell means."""

import pytest

from pipeline.errors import UsageError
from pipeline.tables import SlideNames, read_mpp_csv, read_table

ROWS = [{"slide": "a.svs", "label": "001"}, {"slide": "b,c.svs", "label": "x y"}]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_any_editors_table(tmp_path, separator, end, encoding):
    lines = [f"Slide{separator} label ", f" a.svs {separator}001", "", f'"b,c.svs"{separator}x y', separator]
    path = tmp_path / "t.csv"
    path.write_bytes(end.join(lines).encode(encoding))
    assert read_table(path, ("slide", "label")) == ROWS


def test_one_column_needs_no_separator(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("slide\na.svs\nü b.svs\n", encoding="utf-8")
    assert [row["slide"] for row in read_table(path)] == ["a.svs", "ü b.svs"]


def test_quoted_cells_may_hold_anything(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('slide,label\n"a ""x"", b.svs","two\nlines"\n')
    assert read_table(path) == [{"slide": 'a "x", b.svs', "label": "two\nlines"}]


@pytest.mark.parametrize("text", ["slides,label\na,b\n", "", "\n", "label\n1\n"])
def test_a_missing_column_is_named(tmp_path, text):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UsageError, match="no column 'slide'"):
        read_table(tmp_path / "t.csv")


def test_a_misspelt_column_gets_a_suggestion(tmp_path):
    (tmp_path / "t.csv").write_text("slide,lable\na,b\n")
    with pytest.raises(UsageError, match="Did you mean 'lable'"):
        read_table(tmp_path / "t.csv", ("slide", "label"))


@pytest.mark.parametrize("row", ["a", "a,b,c"])
def test_a_row_of_another_length_is_refused_with_its_line(tmp_path, row):
    (tmp_path / "t.csv").write_text(f"slide,label\nx,y\n{row}\n")
    with pytest.raises(UsageError, match="line 3"):
        read_table(tmp_path / "t.csv")


@pytest.mark.parametrize("content", [None, b"slide\n\xff\xfe caf\xe9\n", b"slide,label\na,\xe9\n"])
def test_what_is_no_text_is_refused(tmp_path, content):
    path = tmp_path / "t.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"t\.csv"):
        read_table(path)


def test_a_stray_quote_in_a_long_table_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text('slide,label\n"a,b\n' + "x.svs,y\n" * 30_000)
    with pytest.raises(UsageError, match=r"t\.csv"):
        read_table(tmp_path / "t.csv")


NAMES = ["a.svs", "case1/b.svs", "case2/b.svs", "TCGA-1.uuid.svs", "two.ome.tif", "two.ome.png"]


@pytest.mark.parametrize(
    ("cell", "slide"),
    [
        ("a.svs", "a.svs"),
        ("a", "a.svs"),
        ("case1/b.svs", "case1/b.svs"),
        ("case1/b", "case1/b.svs"),
        ("TCGA-1", "TCGA-1.uuid.svs"),
        ("TCGA-1.uuid", "TCGA-1.uuid.svs"),
        ("two.ome.tif", "two.ome.tif"),
        ("c.svs", None),
        ("", None),
        ("A.svs", None),
        ("case1", None),
    ],
)
def test_identity_or_unique_stem(tmp_path, cell, slide):
    assert SlideNames(NAMES).find(cell, tmp_path / "t.csv") == slide


@pytest.mark.parametrize("cell", ["b", "b.svs", "two", "two.ome"])
def test_what_could_be_two_slides_is_refused_naming_both(tmp_path, cell):
    both = {"b": "case1/b.svs, case2/b.svs", "t": "two.ome.png, two.ome.tif"}[cell[0]]
    with pytest.raises(UsageError, match=both):
        SlideNames(NAMES).find(cell, tmp_path / "t.csv")


def test_a_path_relative_to_the_table(tmp_path):
    names = SlideNames(NAMES, root=tmp_path / "slides")
    assert names.find("slides/case1/b.svs", tmp_path / "t.csv") == "case1/b.svs"
    assert names.find("b.svs", tmp_path / "slides/case2/t.csv") == "case2/b.svs"
    assert names.find("../case1/b.svs", tmp_path / "slides/case2/t.csv") == "case1/b.svs"
    assert names.find(str(tmp_path / "slides/a.svs"), tmp_path / "t.csv") == "a.svs"
    assert names.find("slides/c.svs", tmp_path / "t.csv") is None


def test_a_cell_that_is_an_identity_and_another_slides_relative_path_is_refused(tmp_path):
    names = SlideNames(["a.svs", "case1/a.svs"], root=tmp_path)
    with pytest.raises(UsageError, match="could be any of"):
        names.find("a.svs", tmp_path / "case1/t.csv")


def mpp_csv(tmp_path, text):
    (tmp_path / "mpp.csv").write_text("slide,mpp\n" + text)
    return read_mpp_csv(tmp_path / "mpp.csv", SlideNames(NAMES))


def test_mpp_of_slides_and_the_cells_that_are_none(tmp_path):
    given, unknown = mpp_csv(tmp_path, "a,0.25\ncase1/b.svs, 0.5\nz.svs,1\na.svs,0.250\n")
    assert given == {"a.svs": 0.25, "case1/b.svs": 0.5}
    assert unknown == ["z.svs"]


@pytest.mark.parametrize("value", ["", "0,5", "40x", "half"])
def test_an_mpp_that_is_no_number(tmp_path, value):
    with pytest.raises(UsageError, match=r"a\.svs"):
        mpp_csv(tmp_path, f'a.svs,"{value}"\n')


def test_two_values_for_one_slide(tmp_path):
    with pytest.raises(UsageError, match=r"two values for a\.svs: 0\.25 and 0\.5"):
        mpp_csv(tmp_path, "a,0.25\na.svs,0.5\n")

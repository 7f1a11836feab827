"""One row a slide, one table, one exit code."""

import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import BrokenBag, MissingMpp
from pipeline.meter import Meter
from pipeline.outcome import COLUMNS, Outcome, Report, failed, read_outcomes, write_outcomes

ROW = Outcome(
    "a/b, c.svs", "done", message='odd "tag"; x', mpp=0.2525, mpp_source="tag: aperio.MPP", reader="openslide",
    width=46000, height=32914, tissue_mm2=12.3456, tiles=1_234_567, seconds=3.21, bound_by="reading",
)  # fmt: skip


def test_columns_are_those_of_the_design():
    """Those of its section 6, then what bounded the slide."""
    design = "slide,status,stage,error,message,mpp,mpp_source,reader,width,height,tissue_mm2,tiles,seconds,bound_by"
    assert (*design.split(","), *Meter().rates()) == COLUMNS


def test_round_trip(tmp_path):
    rows = [Outcome("z.svs", "skipped", "open", message="part of a.dcm"), ROW, Outcome("ünï\n.svs", "failed", tiles=0)]
    write_outcomes(tmp_path / "slides.csv", rows)
    assert read_outcomes(tmp_path / "slides.csv") == sorted(rows, key=lambda row: row.slide)


def test_the_table_is_plain_csv_sorted_and_integers_stay_integers(tmp_path):
    write_outcomes(tmp_path / "slides.csv", [Outcome("b", "done"), ROW, Outcome("a", "empty")])
    with open(tmp_path / "slides.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["slide"] for row in rows] == ["a", "a/b, c.svs", "b"]
    assert rows[1]["tiles"] == "1234567"
    assert rows[1]["mpp"] == "0.2525"
    assert rows[0]["mpp"] == rows[0]["tiles"] == ""


def test_a_name_that_is_no_utf8_survives(tmp_path):
    row = Outcome(b"caf\xe9.svs".decode("utf-8", "surrogateescape"), "done")
    write_outcomes(tmp_path / "slides.csv", [row])
    assert b"caf\xe9.svs" in (tmp_path / "slides.csv").read_bytes()
    assert read_outcomes(tmp_path / "slides.csv") == [row]


def test_rows_that_are_known_are_left_out(tmp_path):
    write_outcomes(tmp_path / "slides.csv", [ROW, Outcome("a", "done"), Outcome("b", "empty")])
    assert [row.slide for row in read_outcomes(tmp_path / "slides.csv", {ROW.slide, "b"})] == ["a"]


def test_a_failed_write_leaves_the_old_table(tmp_path):
    path = tmp_path / "slides.csv"
    write_outcomes(path, [ROW])

    def rows():
        yield Outcome("a", "done")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_outcomes(path, rows())
    assert read_outcomes(path) == [ROW]
    write_outcomes(path, [])
    assert read_outcomes(path) == []
    assert [p.name for p in tmp_path.iterdir()] == ["slides.csv"], "nothing half-written stays"


def test_no_table_no_rows(tmp_path):
    assert read_outcomes(tmp_path / "slides.csv") == []


def test_failed_tells_the_slide_by_its_name_and_in_one_line():
    error = MissingMpp("/data/in/a.svs", "open", "no scale.\n Add:  /data/in/a.svs,<µm per pixel>")
    row = failed("in/a.svs", error)
    assert (row.status, row.stage, row.error) == ("failed", "open", "MissingMpp")
    assert row.message == "no scale. Add: in/a.svs,<µm per pixel>"
    assert failed("a", BrokenBag("a", "store", "x")).error == "BrokenBag"


def test_seconds_add_up_and_the_limit_is_kept():
    meter = Meter(tiles=10, seconds=2.0, encoding=0.5, waiting=1.5, decoded=4_000_000)
    row = Outcome("a", "ready").after(1.2344).after(2.0).at_speed(meter)
    assert (row.seconds, row.bound_by, row.tiles_per_s, row.mpx_per_s) == (3.234, "reading", 5.0, 2.0)
    assert (row.encoder_busy, row.waited_for_tiles) == (0.25, 0.75)
    assert row.after(0).bound_by == "reading"
    assert row.at_speed(Meter()) == row, "nothing was encoded now"


@pytest.mark.parametrize(
    ("states", "interrupted", "code"),
    [
        ("", False, 0),
        ("done done", False, 0),
        ("done empty skipped", False, 0),
        ("empty", False, 0),
        ("skipped", False, 0),
        ("done failed", False, 3),
        ("empty failed", False, 3),
        ("failed", False, 2),
        ("failed skipped", False, 2),
        ("failed failed", True, 130),
        ("done", True, 130),
    ],
)
def test_exit_codes(states, interrupted, code):
    rows = tuple(Outcome(str(i), state) for i, state in enumerate(states.split()))
    report = Report(rows, interrupted=interrupted)
    assert report.exit_code == code
    assert sum(report.counts.values()) == len(rows)
    assert [row.status for row in report.failures] == ["failed"] * states.split().count("failed")


@given(st.lists(st.sampled_from(["done", "empty", "failed", "skipped"]), max_size=6))
def test_zero_means_that_nothing_failed(states):
    report = Report(tuple(Outcome(str(i), state) for i, state in enumerate(states)))
    assert (report.exit_code == 0) == ("failed" not in states)
    assert all(outcome.ok == (outcome.status in ("done", "empty")) for outcome in report.outcomes)

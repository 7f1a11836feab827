"""The output folder: whose it is, by which recipe, and what `status` says of it."""

import json
import os
import stat
from pathlib import Path

import pytest

from extractors import Encoder, EncoderFacts
from pipeline.config import make_config
from pipeline.errors import UsageError
from pipeline.folder import Folder
from pipeline.leases import Course, joined
from pipeline.meter import Meter
from pipeline.outcome import Outcome, Report, write_outcomes
from pipeline.output import (
    batch_sizes,
    check_out,
    in_words,
    make_writable,
    read_run,
    status_lines,
    write_json,
    write_run,
    write_totals,
)
from pipeline.stages import make_recipe
from pipeline.store import BagStore

FACTS = EncoderFacts(name="colour", dim=3, tile_px=32, any_tile_px=True, source="", licence="", citation="")


def recipe(**settings):
    return make_recipe(make_config(encoder="colour", **settings), Encoder(FACTS))


def folder(root="/slides", *names: str) -> Folder:
    return Folder(Path(root), {name: Path(root, name) for name in names})


def group(out, name, status):
    one = BagStore(out).group(name)
    one.begin(slide={"path": name})
    one.finish(status)


def test_run_json_round_trip(tmp_path):
    write_run(tmp_path, folder("/slides", "a"), recipe())
    about = read_run(tmp_path)
    assert about["root"] == "/slides"
    assert about["recipe"] == recipe().as_dict()
    assert about["encoders"] == {
        "colour": {
            "name": "colour",
            "weights": "no weights: made by hand",
            "weights_sha256": "none",
            "weights_file": None,
            "force_scale": False,
        }
    }
    assert about["versions"]["zarr"]
    assert about["hardware"]["cores"] == os.cpu_count()
    check_out(tmp_path, folder("/slides"), recipe(), redo=False)


def test_commands_and_encoders_are_added_to_and_totals_kept(tmp_path):
    write_run(tmp_path, folder(), recipe())
    meter = Meter(tiles=77, seconds=1.1, encoding=1.0, decoded=2_200_000)
    write_totals(tmp_path, Report((Outcome("a", "done"), Outcome("b", "failed")), meter, 1.26), "colour", {"cpu": 32})
    other = make_recipe(make_config(encoder="second"), Encoder(EncoderFacts(**FACTS.as_dict() | {"name": "second"})))
    write_run(tmp_path, folder(), other)
    about = read_run(tmp_path)
    assert [command["encoder"] for command in about["commands"]] == ["colour", "second"]
    assert set(about["encoders"]) == {"colour", "second"}
    assert about["totals"] == {
        "slides": {"done": 1, "failed": 1},
        "tiles_encoded": 77,
        "seconds": 1.3,
        "speed": meter.rates(),
        "bound_by": "bound by encoding: the encoder was busy 91% of the time",
    }
    write_totals(tmp_path, Report(()), "second", {"H200": 256})
    assert (batch_sizes(tmp_path, "colour"), batch_sizes(tmp_path, "second")) == ({"cpu": 32}, {"H200": 256})
    write_totals(tmp_path, Report(()), "colour", {})
    assert batch_sizes(tmp_path, "colour") == {"cpu": 32}, "a run that encoded nothing forgets nothing"
    assert batch_sizes(tmp_path / "new", "colour") == {}


@pytest.mark.parametrize("content", [None, b"", b'{"root": '])
def test_a_run_json_that_cannot_be_read_is_none(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
    assert read_run(tmp_path) == {}
    check_out(tmp_path, folder(), recipe(), redo=False)


def test_json_is_written_in_one_step(tmp_path):
    write_json(tmp_path / "x.json", {"b": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"b": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == {"b": 1}


def test_a_folder_of_other_slides_is_refused(tmp_path):
    write_run(tmp_path, folder("/slides"), recipe())
    for redo in (False, True):
        with pytest.raises(UsageError, match="holds the slides of /slides, not of /others"):
            check_out(tmp_path, folder("/others"), recipe(), redo)


def test_another_recipe_is_refused_with_the_difference_and_its_price(tmp_path):
    write_run(tmp_path, folder(), recipe())
    for name, status in (("a", "complete"), ("b", "empty"), ("c", "writing")):
        group(tmp_path, name, status)
    with pytest.raises(UsageError) as error:
        check_out(tmp_path, folder("/slides", "a", "b", "c", "d"), recipe(mpp=1.0, min_tissue=0.5), redo=False)
    assert "mpp: 0.5 → 1.0" in str(error.value)
    assert "min_tissue: 0.1 → 0.5" in str(error.value)
    assert "2 finished slides" in str(error.value)
    assert "levels" not in str(error.value)
    check_out(tmp_path, folder(), recipe(mpp=1.0), redo=True)


def test_another_encoder_is_no_other_recipe(tmp_path):
    write_run(tmp_path, folder(), recipe())
    check_out(tmp_path, folder(), make_recipe(make_config(encoder="x", force_scale=True), Encoder(FACTS)), redo=False)


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UsageError, match="not a folder"):
        check_out(tmp_path / "out", folder(), recipe(), redo=False)
    check_out(tmp_path / "new", folder(), recipe(), redo=False)
    assert not (tmp_path / "new").exists(), "looking writes nothing"


def test_make_writable_leaves_folders_and_nothing_else(tmp_path):
    make_writable(tmp_path / "deep/out")
    assert sorted(p.name for p in (tmp_path / "deep/out").iterdir()) == ["logs", "qc", "slides"]
    make_writable(tmp_path / "deep/out")


@pytest.mark.parametrize("where", ["mkdir", "write_bytes"])
def test_what_cannot_be_written_to_is_told_before_anything_runs(tmp_path, monkeypatch, where):
    def readonly(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, where, readonly)
    with pytest.raises(UsageError, match="cannot be written to: Read-only"):
        make_writable(tmp_path / "out")


# --- status ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def out(tmp_path):
    write_run(tmp_path, folder(), recipe())
    for name, status in (("a", "complete"), ("b", "complete"), ("c", "empty"), ("d", "writing"), ("e", "writing")):
        group(tmp_path, name, status)
    return tmp_path


def test_status_counts_what_is_there(out):
    write_outcomes(
        out / "slides.csv",
        [Outcome("a", "done"), Outcome("e", "failed", "encode", "CorruptTiles", "bad"), Outcome("f", "failed", "open")],
    )
    lines, code = status_lines(out)
    text = "\n".join(lines)
    assert "2 done, 1 empty, 1 unfinished, 2 failed" in text
    assert "failed      e: encode: bad" in text
    assert "none is going on" in text
    assert "slides of   /slides" in text
    assert code == 3


def test_status_tells_slides_that_were_only_zoomed_into(out):
    about = {"classes": [], "levels": [0], "feature_hash": "h"}
    BagStore(out).group("d").write_prediction("closer", {}, **about, zoom={"k": 0.25})
    BagStore(out).group("e").write_prediction("plain", {}, **about)
    assert "2 done, 1 empty, 1 predicted by zoom, without features, 1 unfinished" in "\n".join(status_lines(out)[0])


def test_a_failure_that_was_mended_is_none(out):
    write_outcomes(out / "slides.csv", [Outcome("a", "failed", "open")])
    assert "failed" not in "\n".join(status_lines(out)[0])


def test_the_code_agrees_with_the_words(out):
    write_outcomes(out / "slides.csv", [Outcome("a", "failed", "open")])
    assert status_lines(out)[1] == 0


def test_status_while_a_run_is_going(out):
    write_outcomes(out / "slides.csv", [Outcome("e", "failed", "encode", "CorruptTiles", "bad")])
    with joined(out, "work") as run:
        text = "\n".join(status_lines(out)[0])
        assert f"going on: process {os.getpid()} on " in text
        assert "left        not known before the first slide is finished" in text
        run.take("e")
        run.progress(Course(settled=2, left=5, settled_bytes=600, left_bytes=9000, seconds=60))
        run.beat()
        lines, code = status_lines(out)
    text = "\n".join(lines)
    assert "2 done, 1 empty, 1 running, 4 waiting, 1 unfinished" in text, "what failed before is being tried again"
    assert "running     e" in text
    assert "2 slides finished" in text
    assert "left        about 15 min" in text
    assert code == 0
    assert "none is going on" in "\n".join(status_lines(out)[0])


@pytest.mark.parametrize(("seconds", "words"), [(3, "3 s"), (300, "5 min"), (9000, "2.5 h")])
def test_time_in_words(seconds, words):
    assert in_words(seconds) == words


def test_status_warns_of_random_weights(out):
    about = read_run(out)
    about["encoders"]["r@random"] = about["encoders"]["colour"] | {"weights": "RANDOM", "weights_sha256": "random"}
    write_json(out / "run.json", about)
    assert any(line.strip() == "r@random: RANDOM" for line in status_lines(out)[0])
    assert not any("colour:" in line for line in status_lines(out)[0])


def test_status_of_no_output_folder(tmp_path):
    with pytest.raises(UsageError, match="no output folder"):
        status_lines(tmp_path)


def test_status_writes_nothing(out):
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    for path in before:
        if path.is_file():
            path.chmod(stat.S_IRUSR)
    status_lines(out)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before

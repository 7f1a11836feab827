"""What people type, and what lies in the folders they name: refused with the next step, and nothing is written."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.batch import predict
from pipeline.errors import BrokenBag, UsageError
from pipeline.outcome import read_outcomes
from pipeline.prediction import load_model, predict_stored
from pipeline.tables import SlideNames, read_mpp_csv
from pipeline.training import train

FLAGS = ("-e", "lab_lbp", "--mpp", 0.5, "--levels", 3, "--tile-px", 64)  # the recipe of the stores that `line` makes


@pytest.fixture
def slide(neighbour, folder) -> Path:
    shutil.copy2(neighbour[0], folder / "a.svs")
    return folder / "a.svs"


@pytest.fixture
def refused(cli, tmp_path):
    """A command that ends with 1; gives what it says on stderr and sees that no output folder was made."""

    def call(*arguments: object) -> str:
        result = cli(*arguments)
        assert result.code == 1, result
        assert "Traceback" not in result.err
        assert "fault of slidestream" not in result.err
        assert not (tmp_path / "out").exists()
        return result.err

    return call


# --- slides -----------------------------------------------------------------------------------------------------------


def test_empty_folder(refused, folder, tmp_path):
    assert f"{folder}: no slide in it" in refused("run", folder, "-o", tmp_path / "out", *FLAGS)


def test_missing_folder(refused, tmp_path):
    words = refused("run", tmp_path / "none", "-o", tmp_path / "out", *FLAGS)
    assert f"{tmp_path / 'none'}: there is no such file or folder" in words


def test_folder_without_slides(refused, folder, tmp_path):
    for name in ("notes.txt", "table.xlsx", ".hidden.svs", "Thumbs.db"):
        (folder / name).write_text("nothing to see")
    words = refused("run", folder, "-o", tmp_path / "out", *FLAGS)
    assert "no slide in it" in words
    assert ".svs" in words, "says what is one"


def test_glob_that_matches_nothing(refused, folder, tmp_path):
    assert "no slide in it" in refused("run", folder / "*.ndpi", "-o", tmp_path / "out", *FLAGS)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("file\na.svs\n", "no column 'slide'"),
        ("slide\n", "no slide in it"),
        ("slide\na.svs\na.svs\n", "stands in it twice"),
        ("slide\n../other/a.svs\n", "lies outside the table's folder"),
    ],
    ids=["column", "no-rows", "twice", "outside"],
)
def test_table_of_slides(rows, words, refused, slide, tmp_path):
    table = slide.parent / "slides.csv"
    table.write_text(rows)
    assert words in refused("run", table, "-o", tmp_path / "out", *FLAGS)


@pytest.mark.slow
def test_nothing_succeeds(slide, folder, slidestream, tmp_path):
    """A text file called .svs and a truncated slide, alone: exit 2, each with its reason."""
    slide.write_bytes(slide.read_bytes()[:-5000])
    (folder / "text.svs").write_text("not a slide\n")
    result = slidestream("run", folder, "-o", tmp_path / "out", *FLAGS)
    assert result.code == 2, result
    assert "Traceback" not in result.out + result.err
    rows = {row.slide: row.message for row in read_outcomes(tmp_path / "out/slides.csv")}
    assert "truncated" in rows["a.svs"]
    assert "a text file" in rows["text.svs"]
    assert slidestream("status", tmp_path / "out").code == 2


# --- names that are not known -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-e", "lab_lpb"], "no encoder is called 'lab_lpb'. Did you mean 'lab_lbp'?"),
        (["-e", "timm/resnet81"], "Did you mean timm/resnet18"),
        (["-e", "no.such:thing"], "cannot import no.such"),
        (["-e", "os.path:joi"], "Did you mean 'join'?"),
        (["--preset", "hvitt"], "Did you mean 'hvit'?"),
        (["--reader", "openslid"], "'openslide'"),
        (["--dtype", "float61"], "'float16' or 'float32'"),
        (["--encode-levels", "fines"], "'fines' is neither all nor finest"),
        (["--tile", "64"], "--tile-px"),
        (["--mpp_csv", "x.csv"], "--mpp-csv"),
        (["--tiler", "os.path:joi"], "joi"),
        (["--tiler", "nonsense"], "module:function"),
        (["--mpp", "0"], "mpp: Input should be greater than or equal to"),
        (["--mpp", "fine"], "--mpp"),
        (["--levels", "0"], "levels: Input should be greater than or equal to 1"),
        (["--levels", "3", "--overlap", "0.5"], "overlap needs levels = 1"),
        (["--config", "none.toml"], "none.toml: No such file"),
        (["--mpp-csv", "none.csv"], "none.csv: No such file"),
        (["--weights", "none.pt"], "none.pt"),
        (["--workers", "0"], "--workers"),
    ],
    ids=lambda value: "=".join(value) if isinstance(value, list) else "",
)
def test_unknown_name_or_value(arguments, words, refused, slide, tmp_path):
    flags = [] if "-e" in arguments else ["-e", "lab_lbp"]
    assert words in refused("run", slide, "-o", tmp_path / "out", *flags, *arguments)


def test_encoder_that_was_not_made_for_such_tiles(refused, slide, tmp_path):
    words = refused("run", slide, "-o", tmp_path / "out", "-e", "uni", "--weights", "random", "--mpp", 8)
    assert "was not made for this" in words
    assert "--force-scale" in words


def test_unknown_command(refused):
    assert "No such command 'runn'. Did you mean 'run'?" in refused("runn")


def test_no_command_at_all(cli):
    result = cli()
    assert result.code == 1
    assert "Commands" in result.err


@pytest.mark.parametrize("arguments", [["run"], ["train"], ["predict"], ["status"]])
def test_arguments_are_missing(arguments, refused):
    assert "Missing" in refused(*arguments)


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("encodr = 'lab_lbp'", "unknown setting 'encodr'. Did you mean 'encoder'?"),
        ("tile-px = 64", "Did you mean 'tile_px'?"),
        ("preset = 'hipp'", "Did you mean 'hipt'?"),
        ("mpp = 'fine'", "mpp: "),
        ("levels = 2.5", "levels: "),
        ("levels = true", "levels: "),
        ("[tiles]\nmpp = 1", "unknown setting 'tiles'"),
        ("mpp = 0.5\nmpp = 1", "not a TOML file"),
        ("\udcff", "not a TOML file"),
    ],
    ids=["key", "dash", "preset", "text", "float", "bool", "table", "twice", "not-utf8"],
)
def test_toml(toml, words, refused, slide, tmp_path):
    (tmp_path / "c.toml").write_bytes(toml.encode(errors="surrogateescape"))
    assert words in refused("run", slide, "-o", tmp_path / "out", "--config", tmp_path / "c.toml")


# --- tables of µm per pixel -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("slide,mpp\na,0.5\n", "'a' could be any of one/a.svs, two/a.svs"),
        ("slide,mpp\na.svs,0.5\n", "'a.svs' could be any of one/a.svs, two/a.svs"),
        ("slide,mpp\none/a.svs,0.5\none/a,0.25\n", "two values for one/a.svs: 0.5 and 0.25"),
        ("slide,mpp\none/a.svs,fine\n", "mpp of 'one/a.svs' is 'fine', which is not a number"),
        ("slide,mpp\none/a.svs,nan\n", "'nan', which is not a number"),
        ("slide;mpp\none/a.svs;0,5\n", "'0,5', which is not a number"),
        ("slide,um\none/a.svs,0.5\n", "no column 'mpp'"),
        ("slide,mpp\none/a.svs\n", "line 2 has not as many cells"),
    ],
    ids=["stem", "name", "two-values", "text", "nan", "decimal-comma", "column", "short"],
)
def test_mpp_table(rows, words, refused, slide, tmp_path):
    for place in ("one", "two"):
        (slide.parent / place).mkdir()
        shutil.copyfile(slide, slide.parent / place / "a.svs")
    slide.unlink()
    table = tmp_path / "mpp.csv"
    table.write_text(rows)
    assert words in refused("run", slide.parent, "-o", tmp_path / "out", "--mpp-csv", table, *FLAGS)


@pytest.mark.parametrize("value", ["-1", "0", "1e9"])
def test_mpp_table_with_an_unbelievable_value(value, slide, line, tmp_path):
    """That slide fails, as with an unbelievable tag; the value is what the message is about."""
    (tmp_path / "mpp.csv").write_text(f"slide,mpp\na,{value}\n")
    given, _ = read_mpp_csv(tmp_path / "mpp.csv", SlideNames(["a.svs"]))
    row = line({"a.svs": slide}, given_mpp=given["a.svs"])["a.svs"]
    assert (row.status, row.error) == ("failed", "MissingMpp")
    assert f"the csv says {float(value)}" in row.message


# --- an output folder of other things ---------------------------------------------------------------------------------


@pytest.fixture
def finished(line, slide):
    assert line({"a.svs": slide})["a.svs"].status == "done"
    return line


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in (folder / "slides").rglob("*")}


def test_finished_run_again_does_nothing(finished, slide, cli):
    before = files(finished.out)
    result = cli("run", slide.parent, "-o", finished.out, *FLAGS)
    assert result.code == 0, result
    assert "1 slides, 1 finished before, 0 to do" in result.out
    assert files(finished.out) == before


@pytest.mark.fault(66, "another recipe for the same folder", "P, with the difference; --redo makes what depends on it")
def test_changed_recipe_is_refused_with_the_difference(finished, slide, cli):
    before = files(finished.out)
    result = cli("run", slide.parent, "-o", finished.out, "-e", "lab_lbp", "--mpp", 1, "--levels", 3, "--tile-px", 64)
    assert result.code == 1
    assert "mpp: 0.5 → 1.0" in result.err
    assert "levels" not in result.err, "what is the same is not listed"
    assert "--redo recomputes what depends on it (1 finished slides)" in result.err
    assert files(finished.out) == before


@pytest.mark.fault(66)
def test_another_root_is_refused(finished, slide, cli, tmp_path):
    shutil.copytree(slide.parent, tmp_path / "others")
    result = cli("run", tmp_path / "others", "-o", finished.out, *FLAGS)
    assert result.code == 1
    assert f"holds the slides of {slide.parent}, not of {tmp_path / 'others'}" in result.err


def test_another_root_is_refused_also_with_redo(finished, slide, cli, tmp_path):
    shutil.copytree(slide.parent, tmp_path / "others")
    assert cli("run", tmp_path / "others", "-o", finished.out, *FLAGS, "--redo").code == 1


@pytest.mark.parametrize("command", ["status", "train", "predict"])
def test_no_output_folder(command, refused, tmp_path):
    (tmp_path / "l.csv").write_text("slide,label\na,b\n")
    more = {"status": [], "train": ["--labels", tmp_path / "l.csv"], "predict": ["--model", "m"]}[command]
    assert "output folder" in refused(command, tmp_path, *more)


COUNTING = """
import dataclasses
import numpy as np
from extractors.lab_lbp import FACTS, LabLbp

seen = set()  # different tiles: some come twice, where a batch size is tried, and blank ones fill up the last batch

class Counting(LabLbp):
    def encode(self, tiles):
        seen.update(tile.tobytes() for tile in np.asarray(tiles) if tile.any())
        return super().encode(tiles)

def build(weights=None):
    return Counting(dataclasses.replace(FACTS, name="counting"))
"""


@pytest.fixture
def encoded(line, slide, tmp_path, monkeypatch):
    """Runs with --redo and other settings; gives the tiles that were encoded, and those that the slide has."""
    (tmp_path / "counting.py").write_text(COUNTING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "counting", raising=False)
    import counting

    def redo(**settings: object) -> tuple[int, int]:
        counting.seen.clear()
        row = line({"a.svs": slide}, redo=True, **{"encoder": "counting:build"} | settings)["a.svs"]
        assert row.status == "done"
        return len(counting.seen), row.tiles

    count, tiles = redo()
    assert count == tiles
    return redo


@pytest.mark.fault(66)
def test_redo_of_what_is_the_same_encodes_nothing(encoded):
    assert encoded()[0] == 0


def test_redo_for_a_setting_without_effect_encodes_nothing(encoded):
    assert encoded(allow_upsampling=True)[0] == 0
    assert encoded(min_region_tissue=0.001)[0] == 0, "other setting, same tiles"


@pytest.mark.fault(66)
def test_redo_for_other_tiles_encodes_them(encoded):
    count, tiles = encoded(min_tissue=0.9)
    assert count == tiles > 0


def test_redo_for_other_tissue_settings_encodes_again(encoded):
    count, tiles = encoded(tissue_mpp=4.0)
    assert count == tiles


def test_redo_for_other_stored_levels_encodes_those(encoded, line):
    count, tiles = encoded(encode_levels="finest")
    finest = line.store.group("a.svs").tree().levels[-1]
    assert count == finest.stop - finest.start < tiles


def test_redo_for_another_type_encodes_again(encoded, line):
    count, tiles = encoded(dtype="float32")
    assert count == tiles
    assert line.store.group("a.svs").features("counting").read()[0].dtype == np.float32


def test_redo_for_a_second_encoder_leaves_the_first(encoded, line):
    before = line.store.group("a.svs").features("counting").read()
    assert encoded(encoder="lab_lbp")[0] == 0, "by the other encoder"
    group = line.store.group("a.svs")
    assert sorted(group.encoders()) == ["counting", "lab_lbp"]
    assert all((old == new).all() for old, new in zip(before, group.features("counting").read(), strict=True))
    assert encoded()[0] == 0


# --- heads and models -------------------------------------------------------------------------------------------------


TABLE = "slide,label\n" + "".join(f"00{i},{'ab'[i % 2]}\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--head", "abmill"], "did you mean 'abmil'?"),
        (["--option", "gatted=true"], "did you mean 'gated'?"),
        (["--option", "gated"], "write name=value"),
        (["--head", "no.such:thing"], "no.such"),
        (["--heads", "abmil"], "--head"),
        (["--level", "3"], "there are 2, 1, 0.5"),
        (["-e", "lab_lpb"], "Did you mean 'lab_lbp'?"),
        (["--name", "../up"], "letters, digits"),
        (["--name", ".."], "letters, digits"),
        (["--epochs", "0"], "--epochs"),
        (["--recipe", "papre"], "abmil has no recipe 'papre'; known are default, paper"),
        (["--recipe", "paper", "--head", "dtfd", "--epochs", "9"], "keep_from must be one of the 9 epochs"),
    ],
    ids=lambda value: "=".join(value) if isinstance(value, list) else "",
)
def test_training_that_cannot_be(arguments, words, refused, cohort, labels):
    before = sorted(os.listdir(cohort.out / "models")) if (cohort.out / "models").exists() else []
    assert words in refused("train", cohort.out, "--labels", labels(TABLE), *arguments)
    assert (sorted(os.listdir(cohort.out / "models")) if before else []) == before


@pytest.fixture
def model(cohort, labels) -> Path:
    return train(cohort.out, labels(TABLE), head="mean", epochs=1, name="known").folder


def test_missing_model_names_those_that_are_there(model, refused, cohort):
    words = refused("predict", cohort.out, "--model", "unknown")
    assert "no model at unknown" in words
    assert "known" in words.split("models there: ")[1]


def test_predicting_tells_how_long_it_took(model, cohort):
    report = predict(cohort.out, model)
    assert report.seconds > 0
    assert all(outcome.status in ("done", "empty") for outcome in report.outcomes)


def test_model_for_other_features(model, slide, line, cli):
    line({"a.svs": slide}, tile_px=32)
    result = cli("predict", line.out, "--model", model)
    assert result.code == 1
    assert "the model was trained on features of lab_lbp at 2, 1, 0.5 µm/px; stored are lab_lbp" in " ".join(
        result.err.split()
    )
    assert not (line.out / "predictions/known.csv").exists()


def test_model_for_other_features_one_slide(model, slide, line):
    line({"a.svs": slide}, tile_px=32)
    with pytest.raises(BrokenBag, match=r"a\.svs: predict: the model was trained on features of lab_lbp"):
        predict_stored(line.store, "a.svs", load_model(model))


@pytest.mark.parametrize("file", ["model.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "deleted", "of something else"])
def test_damaged_model(file, damage, model, cohort, refused):
    path = model / file
    if damage == "deleted":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100] if damage == "cut" else b'{"head": "mean"}')
    words = refused("predict", cohort.out, "--model", "known")
    assert "no model at" in words if damage == "deleted" and file == "model.json" else "not a usable model" in words


def test_predict_with_an_output_folder_and_more(model, cohort, refused, tmp_path):
    words = refused("predict", cohort.out, "--model", "known", "-o", tmp_path / "out")
    assert "is predicted as it is" in words


def test_predict_slides_without_a_place_for_features(model, slide, refused):
    assert "-o" in refused("predict", slide.parent, "--model", model)


def test_settings_of_python_are_those_of_the_command_line(slide, tmp_path):
    from pipeline import run

    with pytest.raises(UsageError, match="Did you mean 'encoder'"):
        run(slide, tmp_path / "out", encodr="lab_lbp")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("said", ["soon", "0", "-1", "nan"])
def test_patience_that_is_no_time(said, slide, cli, tmp_path, monkeypatch):
    monkeypatch.setenv("SLIDESTREAM_PATIENCE", said)
    result = cli("run", slide, "-o", tmp_path / "out", "-e", "lab_lbp")
    assert result.code == 1, result
    assert f"SLIDESTREAM_PATIENCE={said}: it has to be a number of seconds" in result.err

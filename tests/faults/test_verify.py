"""Rows 61-64 of the fault matrix, and what no chunk shows: `verify` names each damage, and the command that it tells
mends it."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pipeline import predict, train, verify
from pipeline.arrays import StoredArray
from pipeline.errors import UsageError
from pipeline.leases import joined
from pipeline.mending import Finding
from pipeline.verification import Verification

SLIDE = "003.svs"
MODEL = "first"


@dataclass
class Made:
    """A copy of a finished output folder and of its slides, and how to mend it as `verify` says."""

    root: Path
    out: Path
    line: type

    @property
    def group(self) -> Path:
        return self.out / "slides" / f"{SLIDE}.zarr"

    def verify(self, **options: object) -> Verification:
        return verify(self.out, **options)

    def faults(self, **options: object) -> list[Finding]:
        return [finding for finding in self.verify(**options).findings if finding.kind != "note"]

    def mend(self, commands: list[str]) -> None:
        """Each of the commands, `run` in this process."""
        for command in commands:
            words = shlex.split(command)
            if words[0] == "rm":
                assert self.out in Path(words[-1]).parents
                subprocess.run(words, check=True)
            elif words[:2] == ["slidestream", "predict"]:
                assert words[2:] == [str(self.out), "--model", MODEL]
                assert predict(self.out, MODEL).exit_code == 0
            else:
                assert words[:6] == ["slidestream", "run", str(self.root), "-o", str(self.out), "-e"]
                self.line(self.out, self.root).folder(self.root, redo="--redo" in words)


@pytest.fixture(scope="session")
def finished(cohort, tmp_path_factory) -> Path:
    """Eight slides with features, one without tissue, and a model's predictions; not to be touched."""
    place = tmp_path_factory.mktemp("finished")
    shutil.copytree(cohort.root, place / "slides")
    others = shutil.ignore_patterns("models", "predictions", "heatmaps")  # other tests train and predict in there
    shutil.copytree(cohort.out, place / "out", ignore=others)
    labels = place / "labels.csv"
    labels.write_text("slide,label\n" + "".join(f"{i:03}.svs,{'ab'[i % 2]}\n" for i in range(1, 9)))
    train(place / "out", labels, head="mean", name=MODEL, epochs=1)
    assert predict(place / "out", MODEL).exit_code == 0
    return place


@pytest.fixture
def made(finished, cohort, tmp_path, monkeypatch) -> Made:
    root, out = tmp_path / "slides", tmp_path / "out"
    shutil.copytree(finished / "slides", root)
    shutil.copytree(finished / "out", out)
    monkeypatch.setattr(sys, "argv", ["/somewhere/slidestream", "run", str(root), "-o", str(out), "-e", "lab_lbp"])
    about = json.loads((out / "run.json").read_bytes())
    command = {"time": "", "command": shlex.join(sys.argv), "encoder": "lab_lbp"}
    about |= {"root": str(root), "commands": [command], "batch_sizes": {"lab_lbp": {"cpu": 16}}}
    (out / "run.json").write_text(json.dumps(about))
    return Made(root, out, type(cohort))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 16
    path.write_bytes(data)


def delete(path: Path) -> None:
    path.unlink()


def set_attributes(path: Path, **values: object) -> None:
    about = json.loads(path.read_bytes())
    about["attributes"] |= values
    path.write_text(json.dumps(about))


def rewrite(group: Path, name: str, change: Callable[[np.ndarray], object]) -> None:
    """Other numbers in an array, by the store's own writer: the checksum is right."""
    array = StoredArray.open(group / name)
    values = array.read().copy()
    change(values)
    for chunk in array.chunks:
        array.write_chunk(chunk, values[array.rows(chunk)])


def test_a_finished_folder_is_whole_and_nothing_is_written(made):
    before = {path: path.stat().st_mtime_ns for path in sorted(made.out.rglob("*"))}
    found = made.verify()
    assert (found.findings, found.exit_code, found.commands) == ((), 0, [])
    assert found.lines() == ["9 slides: 9 whole"]
    assert {path: path.stat().st_mtime_ns for path in sorted(made.out.rglob("*"))} == before


ARRAYS = {
    "features/lab_lbp/x": "c/0/0",
    "features/lab_lbp/valid": "c/0",
    "tissue/mask": "c/0/0",
    "tissue/thumbnail": "c/0/0/0",
    "tiles/grid": "c/0/0",
    "tiles/xy": "c/0/0",
    "tiles/tissue": "c/0",
    "tiles/parent": "c/0",
    f"predictions/{MODEL}/logits": "c/0",
    f"predictions/{MODEL}/weight": "c/0",
}


DAMAGES = [cut, flip, delete]


def spread(names: list[str]) -> list[tuple[str, str]]:
    """(slide, name): each in a slide of its own, as far as there are slides."""
    return [(f"{1 + number % 8:03}.svs", name) for number, name in enumerate(names)]


@pytest.mark.fault(61)
@pytest.mark.parametrize("damage", DAMAGES)
def test_row_61_a_chunk_is_damaged(damage, made):
    where = spread(list(ARRAYS))
    for slide, array in where:
        damage(made.out / "slides" / f"{slide}.zarr" / array / ARRAYS[array])
    found = made.verify()
    assert sorted((f.slide, f.part) for f in found.findings) == sorted(where)
    assert all(f.kind == "damaged" and "chunk 0 is " in f.message for f in found.findings)
    for finding in found.findings:
        shown = damage is delete or (damage is cut and finding.part.endswith("/x"))  # by the size of the file
        assert ("missing or cut" in finding.message) == shown
    assert (found.exit_code, "9 slides: 1 whole, 8 damaged" in found.lines()) == (3, True)
    made.mend(found.commands)
    assert made.faults() == []


@pytest.mark.fault(61)
def test_row_61_what_the_size_shows_needs_no_redo_and_the_rest_does(made):
    delete(made.group / "features/lab_lbp/x/c/0/0")
    assert [command.split()[-1] for command in made.verify().commands] == ["lab_lbp"]
    flip(made.group / "tiles/grid/c/0/0")
    run, again = made.verify().commands
    assert run.endswith(" -e lab_lbp --redo"), "once, and not without --redo as well"
    assert again == f"slidestream predict {made.out} --model {MODEL}", "predictions go with the tiles"


@pytest.mark.fault(61)
@pytest.mark.parametrize("length", range(5))
def test_row_61_a_chunk_shorter_than_a_checksum(length, made):
    chunk = made.group / "tiles/grid/c/0/0"
    chunk.write_bytes(chunk.read_bytes()[:length])
    assert [f.part for f in made.faults()] == ["tiles/grid"]


DOCUMENTS = ["", "tissue/", "tiles/", "features/", "predictions/", "features/lab_lbp/", f"predictions/{MODEL}/"]


@pytest.mark.fault(62)
@pytest.mark.parametrize("damage", [cut, delete])
@pytest.mark.parametrize("documents", [DOCUMENTS, [f"{array}/" for array in ARRAYS]])
def test_row_62_a_zarr_json_is_damaged(documents, damage, made):
    where = spread(documents)
    for slide, document in where:
        damage(made.out / "slides" / f"{slide}.zarr" / f"{document}zarr.json")
    found = made.verify()
    assert {(slide, document.removesuffix("/")) for slide, document in where} <= {
        (f.slide, f.part) for f in found.findings
    }
    assert {f.slide for f in found.findings} == {slide for slide, _ in where}
    assert found.exit_code == 3
    made.mend(found.commands)
    assert made.faults() == []


CONTENTS = ["[]", "{}", '{"attributes": []}', '{"attributes": {"status": "complete"}}', "\0"]
OWN = ["slide", "scale", "reader", "recipe", "hashes", "versions", "counts"]


@pytest.mark.fault(62)
def test_row_62_a_zarr_json_is_of_something_else(made):
    for slide, content in spread(CONTENTS):
        (made.out / "slides" / f"{slide}.zarr/zarr.json").write_text(content)
    found = made.verify()
    assert [(f.slide, f.kind) for f in found.findings if not f.part] == [(s, "damaged") for s, _ in spread(CONTENTS)]
    made.mend(found.commands)
    assert made.faults() == []


@pytest.mark.fault(62)
def test_row_62_an_attribute_is_gone(made):
    for slide, name in spread(OWN):
        path = made.out / "slides" / f"{slide}.zarr/zarr.json"
        about = json.loads(path.read_bytes())
        del about["attributes"][name]
        path.write_text(json.dumps(about))
    found = made.verify()
    assert {slide for slide, state in found.states.items() if state == "damaged"} == {s for s, _ in spread(OWN)}
    made.mend(found.commands)
    assert made.faults() == []


@pytest.mark.fault(63)
def test_row_63_killed_before_the_last_attributes(made):
    set_attributes(made.group / "zarr.json", status="writing")
    set_attributes(made.group / "features/lab_lbp/zarr.json", status="writing")
    delete(made.group / "features/lab_lbp/x/c/0/0")
    left = made.group / "features/lab_lbp/x/c/0/0.0123abcd.partial"
    left.write_bytes(b"half a chunk")
    found = made.verify()
    assert (found.states[SLIDE], found.exit_code) == ("unfinished", 3)
    assert not any("--redo" in command for command in found.commands)
    made.mend(found.commands)
    assert made.faults() == []
    assert not left.exists()


@pytest.mark.fault(63)
def test_row_63_features_of_a_second_encoder_that_are_not_finished(made):
    set_attributes(made.group / "features/lab_lbp/zarr.json", status="writing")
    found = made.verify()
    assert [(f.part, f.kind) for f in found.findings] == [("features/lab_lbp", "unfinished")]
    made.mend(found.commands)
    assert made.faults() == []


@pytest.mark.fault(63)
def test_row_63_a_prediction_that_is_not_finished(made):
    set_attributes(made.group / f"predictions/{MODEL}/zarr.json", status="writing")
    found = made.verify()
    assert [(f.part, f.kind) for f in found.findings] == [(f"predictions/{MODEL}", "unfinished")]
    made.mend(found.commands)
    assert made.faults() == []


@pytest.mark.fault(64)
def test_row_64_features_that_are_all_zero_are_whole(made):
    rewrite(made.group, "features/lab_lbp/x", lambda x: x.fill(0))
    assert made.faults() == []
    assert [f.slide for f in made.faults(deep=True)] == [SLIDE], "but they are not those of the encoder"


# --- numbers that are wrong under a checksum that is right -----------------------------------------------------------


def spoil_rows(x: np.ndarray) -> None:
    x[2:5, 7] = np.nan
    x[9, 0] = np.inf


def test_nan_in_features(made):
    rewrite(made.group, "features/lab_lbp/x", spoil_rows)
    found = made.verify()
    (finding,) = found.findings
    assert (finding.slide, finding.part) == (SLIDE, "features/lab_lbp/x")
    assert finding.message.startswith("4 of ")
    assert "NaN or inf" in finding.message
    made.mend(found.commands)
    assert made.faults() == []


def test_a_row_that_is_not_valid_and_not_zero_and_the_count_of_such(made):
    rewrite(made.group, "features/lab_lbp/valid", lambda valid: valid.__setitem__(3, False))
    found = made.verify()
    assert [(f.slide, f.part) for f in found.findings] == [(SLIDE, "features/lab_lbp/x"), (SLIDE, "")]
    assert "1 rows are not valid, and not zero" in found.findings[0].message
    assert "counts.invalid is 0, features/lab_lbp/valid tells 1" in found.findings[1].message
    made.mend(found.commands)
    assert made.faults() == []


@pytest.mark.parametrize("counts", [{"tiles": [1, 2, 3], "invalid": 0}, {"invalid": 0}, {}])
def test_counts_that_are_wrong(counts, made):
    set_attributes(made.group / "zarr.json", counts=counts)
    found = made.verify()
    assert any("counts.tiles" in f.message and f.slide == SLIDE for f in found.findings)
    made.mend(found.commands)
    assert made.faults() == []


def test_a_parent_that_is_wrong(made):
    rewrite(made.group, "tiles/parent", lambda parent: parent.__setitem__(-1, 0))
    found = made.verify()
    assert [(f.slide, f.part) for f in found.findings] == [(SLIDE, "tiles")]
    assert "is not the one that was written" in found.findings[0].message
    made.mend(found.commands)
    assert made.faults() == []


def test_a_parent_that_is_wrong_under_a_hash_that_is_right(made):
    """As if the code that made the tree were wrong."""
    rewrite(made.group, "tiles/parent", lambda parent: parent.__setitem__(-1, 0))
    facts = json.loads((made.group / "tiles/zarr.json").read_bytes())["attributes"]
    hash_ = rehashed(made.group, facts)
    attrs = json.loads((made.group / "zarr.json").read_bytes())["attributes"]
    set_attributes(made.group / "zarr.json", hashes=attrs["hashes"] | {"tiles": hash_})
    set_attributes(made.group / "features/lab_lbp/zarr.json", tiles=hash_)
    found = made.verify()
    assert [(f.slide, f.part) for f in found.findings] == [(SLIDE, "tiles/parent")]
    assert "1 tiles of level 2 name a parent that is not theirs" in found.findings[0].message
    made.mend(found.commands)
    assert made.faults() == []


def rehashed(group: Path, facts: dict) -> str:
    """The hash of a stored table, by the definition: facts, then the four columns."""
    import hashlib

    total = hashlib.sha256(repr(sorted(facts.items())).encode())
    for name in ("grid", "xy", "tissue", "parent"):
        total.update(StoredArray.open(group / "tiles" / name).read().tobytes())
    return total.hexdigest()


@pytest.mark.parametrize(("name", "value"), [("tiles", "0" * 64), ("feature_hash", "1" * 64), ("levels", [0])])
def test_features_that_are_not_of_these_tiles(name, value, made):
    set_attributes(made.group / "features/lab_lbp/zarr.json", **{name: value})
    found = made.verify()
    assert any(f.part == "features/lab_lbp" and f"its {name} is" in f.message for f in found.findings)
    made.mend(found.commands)
    assert made.faults() == []


def test_features_that_are_gone(made):
    shutil.rmtree(made.group / "features/lab_lbp")
    found = made.verify()
    assert (SLIDE, "features/lab_lbp", "is missing") in [(f.slide, f.part, f.message) for f in found.findings]
    made.mend(found.commands)
    assert made.faults() == []


def test_a_prediction_of_other_features(made):
    set_attributes(made.group / f"predictions/{MODEL}/zarr.json", feature_hash="0" * 64)
    found = made.verify()
    assert [(f.slide, f.part, f.kind) for f in found.findings] == [(SLIDE, f"predictions/{MODEL}", "outdated")]
    made.mend(found.commands)
    assert made.faults() == []


def test_a_prediction_of_nan_or_of_other_tiles(made):
    rewrite(made.group, f"predictions/{MODEL}/logits", lambda logits: logits.fill(np.nan))
    for name in ("raw", "weight"):
        shutil.rmtree(made.group / f"predictions/{MODEL}" / name)
        StoredArray.write(made.group / f"predictions/{MODEL}" / name, np.ones(5, np.float32))
    found = made.verify()
    assert [f.message.split(",")[0] for f in found.findings] == [
        "holds NaN or inf",
        "has scores of 5 and 5 tiles",
    ]
    made.mend(found.commands)
    assert made.faults() == []


# --- slides, the table, run.json, models -----------------------------------------------------------------------------


def test_a_slide_that_changed_and_one_that_was_copied(made):
    shutil.copyfile(made.root / "005.svs", made.root / SLIDE)
    os.utime(made.root / "001.svs", (1, 1))
    found = made.verify()
    assert [(f.slide, f.kind) for f in found.findings] == [(SLIDE, "outdated")]
    made.mend(found.commands)
    assert made.faults() == []


def test_a_slide_that_is_not_there_now(made):
    (made.root / SLIDE).unlink()
    found = made.verify()
    assert ([(f.slide, f.kind) for f in found.findings], found.exit_code) == ([(SLIDE, "note")], 0)
    found = made.verify(deep=True)
    assert ([(f.slide, f.kind) for f in found.findings], found.exit_code) == ([(SLIDE, "failed")], 3)
    shutil.rmtree(made.root)
    found = made.verify()
    assert ([(f.slide, f.kind) for f in found.findings], found.exit_code) == ([("", "note")], 0)
    with pytest.raises(UsageError, match=r"--deep .* there is no folder"):
        made.verify(deep=True)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (f"{SLIDE},done,", f"{SLIDE},empty,", "says empty, and the store is complete"),
        (f"{SLIDE},done,,,", f"{SLIDE},failed,open,MissingMpp,", "says failed, and the store is complete"),
        ("blank.svs,empty,", "blank.svs,done,", "says done, and the store is empty"),
        (f"{SLIDE},done,", "other.svs,done,", "says done, and the store has nothing"),
    ],
)
def test_a_row_that_contradicts_the_store(old, new, words, made):
    table = made.out / "slides.csv"
    text = table.read_text()
    assert old in text
    table.write_text(text.replace(old, new))
    found = made.verify()
    assert [(f.part, f.kind, f.message) for f in found.findings if f.kind != "note"] == [
        ("slides.csv", "outdated", words)
    ]
    made.mend(found.commands)
    assert made.verify().findings == ()


def test_rows_of_failed_slides_are_told(made):
    (made.root / "text.svs").write_text("no slide")
    made.line(made.out, made.root).folder(made.root)
    found = made.verify()
    assert [(f.slide, f.part, f.kind) for f in found.findings] == [("text.svs", "open", "failed")]
    assert (found.exit_code, found.lines()[1]) == (3, "10 slides: 9 whole, 1 failed")


@pytest.mark.parametrize("file", ["slides.csv", "run.json"])
@pytest.mark.parametrize("damage", [cut, delete])
def test_the_folders_own_files(file, damage, made):
    damage(made.out / file)
    found = made.verify()
    assert (file, "damaged") in [(f.part, f.kind) for f in found.findings]
    if file == "run.json":
        assert found.commands == [f"slidestream run SLIDES -o {made.out} … (as it was first given: run.json, which "
                                  "tells it, cannot be read)"]  # fmt: skip
        made.line(made.out, made.root).folder(made.root)
    else:
        made.mend(found.commands)
    assert made.faults() == []


def test_another_recipe_in_run_json(made):
    about = json.loads((made.out / "run.json").read_bytes())
    about["recipe"]["min_tissue"] = 0.3
    (made.out / "run.json").write_text(json.dumps(about))
    found = made.verify()
    assert {f.kind for f in found.findings} == {"outdated"}
    assert "min_tissue: 0.1 → 0.3" in found.findings[0].message


def test_models(made):
    folder = made.out / "models" / MODEL
    flip_weights = folder / "model.safetensors"
    cut(flip_weights)
    (finding,) = made.faults()
    assert (finding.part, finding.kind) == (f"models/{MODEL}", "damaged")
    (folder / "model.json").unlink()
    (finding,) = made.faults()
    assert (finding.part, finding.kind) == (f"models/{MODEL}", "unfinished")


def test_what_killed_writers_left_is_a_note(made):
    for name in (
        "run.json.1.partial",
        "models/first/model.json.partial",
        f"slides/{SLIDE}.zarr/tiles/grid/c/a.partial",
    ):
        (made.out / name).write_bytes(b"half")
    found = made.verify()
    assert [f.kind for f in found.findings] == ["note"] * 3
    assert (found.exit_code, found.lines()[-1]) == (0, "9 slides: 9 whole; 3 notes")
    for finding in found.findings:
        subprocess.run(shlex.split(finding.mend[0]), check=True)
    assert made.verify().findings == ()


def test_while_a_run_is_going_on(made):
    """What it has taken up is unfinished, its table lags behind; damage elsewhere is damage."""
    set_attributes(made.group / "zarr.json", status="writing")
    flip(made.out / "slides/005.svs.zarr/tissue/mask/c/0/0")
    with joined(made.out, "work") as leases:
        leases.take(SLIDE)
        found = made.verify()
    assert [(f.slide, f.part, f.kind) for f in found.findings] == [
        (SLIDE, "", "unfinished"),
        ("005.svs", "tissue/mask", "damaged"),
    ]
    assert f"process {os.getpid()}" in found.findings[0].message


def test_no_output_folder(tmp_path):
    with pytest.raises(UsageError, match="is no output folder"):
        verify(tmp_path)


# --- deep ------------------------------------------------------------------------------------------------------------


def test_deep_sees_swapped_features(made):
    groups = [made.out / f"slides/{name}.zarr" for name in (SLIDE, "005.svs")]
    a, b = (StoredArray.open(group / "features/lab_lbp/x").read().copy() for group in groups)
    n = min(len(a), len(b))
    rewrite(groups[0], "features/lab_lbp/x", lambda x: np.copyto(x[:n], b[:n]))
    rewrite(groups[1], "features/lab_lbp/x", lambda x: np.copyto(x[:n], a[:n]))
    assert made.faults() == []
    found = made.verify(deep=True)
    assert [(f.slide, f.part) for f in found.findings] == [
        (SLIDE, "features/lab_lbp/x"),
        ("005.svs", "features/lab_lbp/x"),
    ]
    made.mend(found.commands)
    assert made.faults(deep=True) == []


def test_deep_on_what_is_whole_says_which_test(made):
    os.utime(made.root / SLIDE, (1, 1))  # a copy is the same slide
    before = {path: path.stat().st_mtime_ns for path in sorted(made.out.rglob("*"))}
    found = made.verify(deep=True)
    assert found.findings == ()
    assert found.deep[0].endswith("tiles of 8 slides encoded anew by lab_lbp: all are the same bits")
    assert {path: path.stat().st_mtime_ns for path in sorted(made.out.rglob("*"))} == before


def test_deep_without_weights_is_a_usage_error(made):
    about = json.loads((made.out / "run.json").read_bytes())
    about["encoders"]["lab_lbp"] |= {"name": "resnet50", "weights_file": "/nowhere/w.pt"}
    (made.out / "run.json").write_text(json.dumps(about))
    with pytest.raises(UsageError, match=r"there is no file /nowhere/w\.pt"):
        made.verify(deep=True)


def test_the_real_commands(made, slidestream):
    """`verify` on a terminal: the line, the sum, the command; and that command, as it is typed."""
    flip(made.group / "features/lab_lbp/x/c/0/0")
    told = slidestream("verify", made.out)
    assert told.code == 3
    assert f"damaged    {SLIDE} features/lab_lbp/x: chunk 0 is damaged: the checksum is wrong" in told.out
    assert "9 slides: 8 whole, 1 damaged\nto mend it:\n  slidestream run " in told.out

"""Rows 67-69 and 77-80 of the fault matrix: checkpoints and label tables that people have, and errors that travel."""

import multiprocessing
import os
import pickle
import re
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from pipeline import run
from pipeline.bags import Store
from pipeline.errors import (
    BrokenBag,
    CorruptTiles,
    MissingMpp,
    SlideError,
    TooCoarse,
    UnreadableSlide,
    UsageError,
)
from pipeline.labels import read_labels
from pipeline.readers import open_slide
from pipeline.training import train

torch = pytest.importorskip("torch")
ENCODER = "timm/test_resnet"


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def state() -> dict:
    from extractors import load_encoder
    from extractors.timm import timm_network

    assert load_encoder(ENCODER, "random").facts.dim
    return timm_network("test_resnet").state_dict()


@pytest.fixture
def refused(neighbour, tmp_path):
    """Runs with a checkpoint; gives the words of the refusal and sees that nothing was written."""

    def call(weights) -> str:
        with pytest.raises(UsageError) as error:
            run(neighbour[0], tmp_path / "out", encoder=ENCODER, weights=str(weights), tile_px=160)
        assert not (tmp_path / "out").exists()
        return str(error.value)

    return call


@pytest.mark.fault(67, "checkpoint with other keys, shapes, NaN", "P, with the keys")
def test_row_67_wrong_prefix(state, tmp_path, refused):
    torch.save({f"strange.{name}": value for name, value in state.items()}, tmp_path / "w.pt")
    words = refused(tmp_path / "w.pt")
    assert "missing: conv1.0.weight" in words
    assert "unexpected: strange.conv1.0.weight" in words


@pytest.mark.fault(67)
def test_row_67_wrong_shape(state, tmp_path, refused):
    torch.save(state | {"conv1.0.weight": torch.zeros(3, 3)}, tmp_path / "w.pt")
    assert "other shape: conv1.0.weight (3, 3) instead of" in refused(tmp_path / "w.pt")


@pytest.mark.fault(67)
def test_row_67_wrapped_in_something_unknown(state, tmp_path, refused):
    torch.save({"student_net": dict(state), "epoch": 3}, tmp_path / "w.pt")
    assert "student_net" in refused(tmp_path / "w.pt")


@pytest.mark.fault(67)
def test_row_67_nan(state, tmp_path, refused):
    torch.save(state | {"conv1.1.bias": torch.full_like(state["conv1.1.bias"], np.nan)}, tmp_path / "w.pt")
    assert "NaN or infinite: conv1.1.bias" in refused(tmp_path / "w.pt")


@pytest.mark.fault(68, "checkpoint cut, HTML, git-lfs pointer", "P, with the cause")
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_row_68_cut_checkpoint(share, kind, state, tmp_path, refused):
    from safetensors.torch import save_file

    path = tmp_path / f"w.{kind}"
    torch.save(state, path) if kind == "pt" else save_file(state, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    words = refused(path)
    assert str(path) in words
    assert "cut or damaged" in words


@pytest.mark.fault(68)
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><title>Sign in</title>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n", "git-lfs pointer"),
        (b"these are no weights at all", "neither a safetensors nor a torch file"),
    ],
    ids=["empty", "html", "lfs", "text"],
)
def test_row_68_not_a_checkpoint(content, words, tmp_path, refused):
    (tmp_path / "w.safetensors").write_bytes(content)
    assert words in refused(tmp_path / "w.safetensors")


@pytest.mark.fault(68)
def test_row_68_no_such_checkpoint(tmp_path, refused):
    assert f"there is no file {tmp_path / 'w.pt'}" in refused(tmp_path / "w.pt")


class Evil:
    def __init__(self, marker) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def plain_pickle(value: object, path) -> None:
    path.write_bytes(pickle.dumps(value))


@pytest.mark.fault(69, "pickle that would run a program", "P, not run")
@pytest.mark.parametrize("save", [torch.save, plain_pickle])
def test_row_69_evil_pickle_is_not_run(save, tmp_path, refused):
    marker, path = tmp_path / "was here", tmp_path / "w.pt"
    save({"state_dict": Evil(f"'{marker}'")}, path)
    assert str(path) in refused(path)
    assert not marker.exists()
    torch.load(path, weights_only=False) if save is torch.save else pickle.loads(path.read_bytes())
    assert marker.exists(), "it would have run"


@pytest.mark.fault(69)
def test_row_69_the_refusal_says_what_is_in_it(tmp_path, refused):
    torch.save({"state_dict": Evil(tmp_path / "was here")}, tmp_path / "w.pt")
    assert "was refused and not run: besides tensors it holds" in refused(tmp_path / "w.pt")


@pytest.mark.fault(67)
@pytest.mark.fault(68)
@pytest.mark.fault(69)
def test_row_67_on_the_command_line(tmp_path, neighbour, cli):
    (tmp_path / "w.pt").write_bytes(b"<html>")
    result = cli("run", neighbour[0], "-o", tmp_path / "out", "-e", ENCODER, "--weights", tmp_path / "w.pt")
    assert result.code == 1
    assert "web page" in result.err
    assert not (tmp_path / "out").exists()


# --- errors that travel -----------------------------------------------------------------------------------------------

KINDS = (SlideError, UnreadableSlide, MissingMpp, TooCoarse, CorruptTiles, BrokenBag)


@pytest.mark.fault(77, "SlideError pickled", "equal, with its cause")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_row_77_slide_error_is_pickled(kind, protocol):
    error = kind("a\nb.svs", "encode", "why: 50 % \udce9")
    copy = pickle.loads(pickle.dumps(error, protocol))
    assert type(copy) is kind
    assert (copy.args, copy.path, copy.stage, copy.reason) == (error.args, error.path, error.stage, error.reason)
    assert str(copy) == str(error)


@pytest.mark.fault(77)
def test_row_77_every_kind_is_looked_at():
    assert set(KINDS) == {SlideError, *SlideError.__subclasses__()}


@pytest.mark.fault(77)
def test_row_77_through_a_process_pool(tmp_path):
    """It arrives as what it is, and names what it came from; the pool lives on."""
    missing = tmp_path / "a.svs"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        error = pool.submit(open_slide, missing).exception()
        assert type(error) is UnreadableSlide
        assert error.args == (str(missing), "open", "there is no such file")
        assert "FileNotFoundError" in str(error.__cause__), "the remote traceback tells the cause"
        assert pool.submit(len, "abc").result() == 3


# --- label tables -----------------------------------------------------------------------------------------------------

TABLE = "slide,label\n" + "".join(f"00{i},{'tumour' if i % 2 else 'normal'}\n" for i in range(1, 9))


@pytest.mark.fault(78, "labels: BOM, CRLF, ;, UTF-16, no table", "read, or P")
@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode(),
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.encode("utf-16"),
        lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.replace("\n", "\r").encode(),
        lambda text: text.replace(",", ";").encode("utf-8-sig"),
        lambda text: text.replace(",", "\t").encode(),
        lambda text: text.replace(",", " , ").encode(),
        lambda text: text.replace("slide,label", "Slide,LABEL").encode(),
        lambda text: text.replace("tumour", '"tumour"').encode(),
        lambda text: (text + "\n\n,\n").encode(),
        lambda text: text.rstrip("\n").encode(),
        lambda text: text.replace("001", "001.svs").encode(),
    ],
    ids=[
        *("plain", "bom", "utf16", "utf16be", "crlf", "cr", "semicolon-bom", "tab", "spaces", "upper-case"),
        *("quotes", "blank-lines", "no-last-newline", "with-extension"),
    ],
)
def test_row_78_label_table_as_programs_write_it(encode, labels, cohort):
    known = read_labels(labels(encode(TABLE)), Store(cohort.store.root))
    assert known.slides == [f"00{i}.svs" for i in range(1, 9)]
    assert known.column("label") == ["tumour", "normal"] * 4


@pytest.mark.fault(78)
@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("slide,label\n001,größe\n".encode("latin-1"), "not UTF-8"),
        (TABLE.encode("utf-16-le"), "no column"),
        (b"", "no column"),
        ("slide,lable\n001,a\n", "Did you mean 'lable'?"),
        ("slide,label\n001,a,b\n", "line 2 has not as many cells"),
        ("slide,label\n001\n", "line 2 has not as many cells"),
        ("slide,label\n001,\n", "empty label"),
        ("slide,label,split\n001,a,trian\n002,b,test\n", "'trian'; known are train"),
    ],
    ids=[
        *("latin1", "utf16-without-mark", "empty", "misspelt-column"),
        *("long-row", "short-row", "empty-label", "misspelt-split"),
    ],
)
def test_row_78_label_table_that_cannot_be_read(table, words, labels, cohort, cli):
    path = labels(table)
    with pytest.raises(UsageError, match=re.escape(words)) as error:
        read_labels(path, Store(cohort.store.root))
    assert str(path) in str(error.value)
    result = cli("train", cohort.out, "--labels", path)
    assert (result.code, "Traceback" in result.err) == (1, False)
    assert words in result.err


@pytest.mark.fault(79, "labels: duplicates, missing, unknown", "P, or listed")
def test_row_79_missing_label_table(cohort, cli, tmp_path):
    result = cli("train", cohort.out, "--labels", tmp_path / "none.csv")
    assert result.code == 1
    assert "No such file" in result.err


@pytest.mark.fault(79)
def test_row_79_contradicting_duplicates(labels, cohort, cli):
    path = labels(TABLE + "001.svs,normal\n")
    with pytest.raises(UsageError, match=r"two rows for 001\.svs that differ"):
        read_labels(path, Store(cohort.store.root))
    assert cli("train", cohort.out, "--labels", path).code == 1


def test_a_table_of_clam_calls_the_slide_by_another_name(labels, cohort):
    known = read_labels(labels(TABLE.replace("slide,label", "slide_id,label")), Store(cohort.store.root))
    assert known.slides == [f"00{i}.svs" for i in range(1, 9)]


@pytest.mark.fault(79)
def test_row_79_the_same_row_twice_is_one_row(labels, cohort):
    known = read_labels(labels(TABLE + "001,tumour\n"), Store(cohort.store.root))
    assert len(known.slides) == 8


@pytest.mark.fault(79)
def test_row_79_the_same_slide_by_two_names_is_no_contradiction(labels, cohort):
    """`001` and `001.svs` with one label say the same."""
    known = read_labels(labels(TABLE + "001.svs,tumour\n"), Store(cohort.store.root))
    assert len(known.slides) == 8


@pytest.mark.fault(79)
def test_row_79_missing_and_unknown_and_empty_slides_are_listed(labels, cohort):
    rows = TABLE.splitlines()[:-1]  # 008 is left out
    known = read_labels(labels("\n".join([*rows, "999,tumour", "blank,normal"])), Store(cohort.store.root))
    words = " ".join(known.warnings)
    assert len(known.slides) == 7
    assert "1 rows name no slide of this store: 999." in words
    assert "1 slides of the store have no label: 008.svs." in words
    assert "1 labelled slides have no features (empty or unfinished): blank.svs." in words


@pytest.mark.fault(79)
def test_row_79_warnings_reach_the_terminal(labels, cohort, cli):
    path = labels(TABLE + "999,tumour\n")
    result = cli("train", cohort.out, "--labels", path, "--head", "mean", "--epochs", 2, "--name", "told")
    assert result.code == 0, result.err
    assert "note: 1 rows name no slide of this store: 999." in result.out


@pytest.mark.fault(79)
def test_row_79_only_unknown_slides(labels, cohort, cli):
    result = cli("train", cohort.out, "--labels", labels("slide,label\n997,a\n998,b\n"))
    assert result.code == 1
    assert "not one row names a slide with features" in result.err
    assert "997, 998" in result.err


def test_one_class_only(labels, cohort, cli):
    result = cli("train", cohort.out, "--labels", labels("slide,label\n" + "".join(f"00{i},a\n" for i in range(1, 9))))
    assert result.code == 1
    assert "one class" in result.err


def test_a_class_with_one_slide(labels, cohort, cli):
    rows = "slide,label\n001,rare\n" + "".join(f"00{i},a\n" for i in range(2, 9))
    result = cli("train", cohort.out, "--labels", labels(rows))
    assert result.code == 1
    assert "no validation set can be parted off" in result.err


def test_a_patient_on_both_sides_of_the_split(labels, cohort, cli):
    rows = "slide,label,patient,split\n001,a,P1,train\n002,b,P2,train\n003,a,P1,test\n004,b,P3,val\n"
    result = cli("train", cohort.out, "--labels", labels(rows))
    assert result.code == 1
    assert "P1" in result.err


@pytest.mark.fault(80, "slides called 001, labels 00 and 01", "text, not numbers")
def test_row_80_identities_and_labels_are_text(labels, cohort):
    rows = "slide,label\n" + "".join(f"00{i},0{i % 2}\n" for i in range(1, 9)) + "1,00\n"
    known = read_labels(labels(rows), Store(cohort.store.root))
    assert known.slides == [f"00{i}.svs" for i in range(1, 9)]
    assert set(known.column("label")) == {"00", "01"}, "not the numbers 0 and 1"
    assert "1 rows name no slide of this store: 1." in known.warnings[0], "1 is not 001"


@pytest.mark.fault(80)
def test_row_80_classes_of_the_model_are_the_text_of_the_table(labels, cohort):
    rows = "slide,label\n" + "".join(f"00{i},0{i % 2}\n" for i in range(1, 9))
    trained = train(cohort.out, labels(rows), head="mean", epochs=1, name="text")
    assert '"classes": [\n  "00",\n  "01"\n ]' in (trained.folder / "model.json").read_text()

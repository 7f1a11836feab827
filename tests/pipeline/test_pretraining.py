"""Pre-training on a store: what is written, what resumes, whose slides are used, and who is warned."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from extractors import dino, load_encoder
from extractors.dino import about_weights, read_checkpoint
from extractors.weights import sha256
from heads import load_head
from pipeline import BagStore, pretraining, run, train, unbiased
from pipeline.demo import write_slide
from pipeline.errors import RunStopped, UsageError
from pipeline.pretraining import Pretrained, pretrain

ARCH, NAMES = "vit_tiny_scorenet", tuple(f"{name}.tif" for name in "abcdefghijkl")
SMALL = replace(
    dino.RECIPES[ARCH], wide_px=32, small_px=16, small_views=2, hidden=16, bottleneck=8, prototypes=24, epochs=3,
    batch_size=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve slides of as many patients, encoded by hand: dark ones are `pos`."""
    root = tmp_path_factory.mktemp("pretraining")
    (root / "slides").mkdir()
    rows = ["slide,label,patient"]
    for seed, name in enumerate(NAMES):
        random = np.random.default_rng(seed)
        pixels = random.integers(241, 246, (512, 512, 3), dtype=np.uint8)
        pixels[64:448, 64:448] = random.integers(60, 120 + 80 * (seed % 2), (384, 384, 3), dtype=np.uint8)
        write_slide(root / "slides" / name, pixels, 0.5, downsamples=(4,), lossless=True)
        rows.append(f"{name},{'neg' if seed % 2 else 'pos'},p{seed}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    report = run(root / "slides", root / "out", encoder="lab_lbp", mpp=0.5, tile_px=128, workers=1)
    assert report.exit_code == 0
    return root


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """An output folder of its own, of the same slides."""
    shutil.copytree(made / "out", tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dino.RECIPES, ARCH, SMALL)
    monkeypatch.setattr(pretraining, "WATCHED_TILES", 48)


def work(out: Path, **options: Any) -> Pretrained:
    return pretrain(out, arch=ARCH, **{"tiles_per_epoch": 24} | options)


def test_what_it_writes(out: Path) -> None:
    seen = []
    done = work(out, on_epoch=lambda course: seen.append(course.words()))
    assert done.weights == out / "pretrained" / ARCH / "weights.safetensors"
    assert done.epoch == len(done.course.losses) == len(seen) == 3
    assert seen[0].startswith("epoch 1   loss ")
    assert done.course.watched == []
    assert done.warnings == ()
    about = json.loads((done.weights.parent / "pretrained.json").read_text())
    assert about["sha256"] == sha256(done.weights)
    assert about["losses"] == done.course.losses
    assert (about["arch"], about["pretext"], about["mpp"], about["tile_px"]) == (ARCH, "dino", 0.5, 128)
    assert about["recipe"] == SMALL.as_dict()
    prints = {name: BagStore(out).group(name).attrs["slide"]["fingerprint"] for name in NAMES}
    assert about["slides"] == about_weights(done.weights)["slides"] == prints
    assert (done.weights.parent / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert done.weights.stat().st_mode & 0o044 == (done.weights.parent / "pretrained.json").stat().st_mode & 0o044
    teacher = read_checkpoint(done.weights.parent / "checkpoint.pt")["teacher"]
    encoder = load_encoder(ARCH, done.weights).load()
    for key, value in encoder._network.state_dict().items():  # type: ignore[attr-defined]
        assert torch.equal(value, teacher[f"backbone.{key}"])


def test_the_weights_serve_a_run(made: Path, out: Path) -> None:
    done = work(out, epochs=1)
    assert (
        run(made / "slides", out, encoder=ARCH, weights=str(done.weights), mpp=0.5, tile_px=128, workers=1).exit_code
        == 0
    )
    bag = BagStore(out).bag("a.tif", ARCH)
    assert bag.levels[0].features.shape[1] == 96


def test_the_same_call_goes_on_where_it_was(out: Path, tmp_path: Path) -> None:
    straight = work(out, name="straight")

    def interrupted(course: dino.Course) -> None:
        if len(course.losses) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(out, name="parts", on_epoch=interrupted)
    (out / "pretrained/parts/weights.safetensors.1.partial").write_bytes(b"cut")
    resumed = work(out, name="parts")
    assert not list(resumed.weights.parent.glob("*.partial"))
    assert resumed.course == straight.course
    assert resumed.weights.read_bytes() == straight.weights.read_bytes()
    before = resumed.weights.stat().st_mtime_ns
    again = work(out, name="parts")
    assert (again.tiles_per_s, again.course) == (None, straight.course)
    assert again.weights.stat().st_mtime_ns == before, "nothing was left to do"


def test_another_recipe_needs_another_name(out: Path) -> None:
    work(out, epochs=1)
    for other, words in (
        ({"lr": 0.1, "epochs": 1}, r"lr: 0\.0005 → 0\.1"),
        ({"epochs": 2}, "epochs: 1 → 2"),
        ({"tiles_per_epoch": 16, "epochs": 1}, "tiles_per_epoch: 24 → 16"),
    ):
        with pytest.raises(UsageError, match=rf"another pre-training:\n  {words}\ngive this one a --name"):
            work(out, **other)
    group = BagStore(out).group("a.tif")
    group.update(slide=group.attrs["slide"] | {"fingerprint": "another"})
    with pytest.raises(UsageError, match="slides: other ones"):
        work(out, epochs=1)


def test_a_damaged_checkpoint_is_said(out: Path) -> None:
    done = work(out, epochs=1)
    (done.weights.parent / "checkpoint.pt").write_bytes(b"PK\3\4 cut")
    with pytest.raises(UsageError, match=r"damaged.*remove it to begin anew"):
        work(out, epochs=1)


# -- labels --


def test_the_slides_of_a_fold_are_its_training_slides(made: Path, out: Path) -> None:
    labels = made / "labels.csv"
    seen = []
    for fold in range(2):
        done = work(out, labels=labels, cv=2, fold=fold, name=f"fold{fold}", epochs=1)
        seen.append(set(about_weights(done.weights)["slides"]))
        assert len(done.course.watched) == 1
        model = train(out, labels, head="mean", encoder="lab_lbp", cv=2, epochs=1)
        parts = json.loads((model.folder / f"fold{fold}" / "model.json").read_text())["training"]["slides"]
        assert seen[-1] == set(parts["train"])
    assert seen[0] != seen[1]


def test_the_tables_own_split(made: Path, out: Path, tmp_path: Path) -> None:
    rows = (made / "labels.csv").read_text().splitlines()
    parts = ["train"] * 6 + ["val"] * 2 + ["test"] * 4
    table = tmp_path / "split.csv"
    table.write_text("\n".join([f"{rows[0]},split", *(f"{r},{p}" for r, p in zip(rows[1:], parts, strict=True))]))
    done = work(out, labels=table, epochs=1)
    assert set(about_weights(done.weights)["slides"]) == set(NAMES[:6])
    everyone = work(out, labels=made / "labels.csv", epochs=1, name="everyone")
    assert set(about_weights(everyone.weights)["slides"]) == set(NAMES)


def test_neighbours_are_of_other_patients(made: Path, out: Path) -> None:
    done = work(out, labels=made / "labels.csv")
    assert len(done.course.watched) == 3
    assert done.course.watched[0] > 0.7, "dark and light noise"
    one = made / "labels.csv"
    table = out / "one.csv"
    table.write_text(re.sub(r"pos,p\d+", "pos,p0", one.read_text()))
    assert work(out, labels=table, name="one", epochs=1).course.watched == [], "a class that one patient alone has"


def test_patience_keeps_the_best(made: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([0.5, 0.8, 0.8, 0.7, 0.9])
    monkeypatch.setattr(pretraining, "accuracy", lambda *_: next(values))
    kept = {}

    def keep(course: dino.Course) -> None:
        kept[len(course.losses)] = (out / "pretrained/patient/weights.safetensors").read_bytes()

    done = work(out, labels=made / "labels.csv", patience=2, epochs=9, name="patient", on_epoch=keep)
    assert done.course.watched == [0.5, 0.8, 0.8, 0.7]
    assert done.epoch == 2
    assert done.weights.read_bytes() == kept[2] == kept[4] != kept[1]
    assert about_weights(done.weights)["epoch"] == 2
    assert work(out, labels=made / "labels.csv", patience=2, epochs=9, name="patient").tiles_per_s is None


def test_train_warns_of_test_slides_that_were_seen(made: Path, out: Path) -> None:
    labels = made / "labels.csv"
    done = work(out, labels=labels, cv=2, fold=0, epochs=1)
    seen = set(about_weights(done.weights)["slides"])
    run(made / "slides", out, encoder=ARCH, weights=str(done.weights), mpp=0.5, tile_px=128, workers=1)
    found = train(out, labels, head="mean", encoder=ARCH, cv=2, epochs=1, name="warned").warnings
    warned = [w for w in found if "seen by the encoder" in w]
    assert len(warned) == 1, "fold 0 is the one that it was made for"
    assert "test slides of fold1" in warned[0]
    assert all(name in warned[0] for name in seen)
    assert not any("seen" in w for w in train(out, labels, head="mean", encoder="lab_lbp", cv=2, epochs=1).warnings)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arch": "resnet50"}, "--arch resnet50 --pretext dino: known are --pretext dino: --arch vit_small_dino or"),
        ({"pretext": "unbiased"}, "--pretext unbiased: known are .*--arch scorenet"),
        ({"pretext": "other"}, "--pretext other: known are"),
        ({"arch": "vit_small_dino"}, "takes tiles of 224 px, these have 128 px, and nothing is enlarged"),
        (
            {"arch": "scorenet", "pretext": "unbiased"},
            "takes tiles of a multiple of 128 px, such as 1024, these have 128",
        ),
        ({"fold": 0}, "need --labels"),
        ({"cv": 2}, "need --labels"),
        ({"labels": True, "fold": 0}, "give both, or neither"),
        ({"labels": True, "cv": 2}, "give both, or neither"),
        ({"labels": True, "cv": 2, "fold": 2}, "numbered from 0 to 1"),
        ({"patience": 3}, "nothing to watch without --labels"),
        ({"batch_size": 512}, "less than a batch of 512"),
        ({"level": 3.0}, "--level 3: the tiles have 2, 1, 0.5"),
        ({"name": "../x"}, "name becomes a folder"),
        ({"device": "cuda:9"}, "cannot be used here"),
    ],
)
def test_wrong_usage_writes_nothing(made: Path, out: Path, options: dict[str, Any], words: str) -> None:
    if options.get("labels"):
        options = options | {"labels": made / "labels.csv"}
    with pytest.raises(UsageError, match=words):
        pretrain(out, **{"arch": ARCH} | options)
    assert not (out / "pretrained").exists()


# -- ScoreNet's own pretext --


def test_unbiased_makes_weights_of_scorenet(made: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(unbiased.RECIPE, hidden=16, bottleneck=8, prototypes=24, epochs=2, batch_size=2)
    monkeypatch.setattr(unbiased, "RECIPE", small)
    monkeypatch.setattr(unbiased, "PLACES", 2)
    large = out.parent / "large"
    assert run(made / "slides", large, encoder="lab_lbp", mpp=0.5, tile_px=256, levels=1, workers=1).exit_code == 0
    done = pretrain(large, arch="scorenet", pretext="unbiased", tiles_per_epoch=4)
    assert len(done.course.losses) == 2
    head = load_head("scorenet", classes=3, k=2, weights=str(done.weights))
    begun, first = head.state_dict(), unbiased.student().state_dict()
    teacher = read_checkpoint(done.weights.parent / "checkpoint.pt")["teacher"]
    for key in first:
        assert torch.equal(begun[key], teacher[f"backbone.{key}"])
    assert "weights" not in head.options
    assert load_head("scorenet", classes=3, **head.options).options == head.options


def test_students_choose_and_teachers_look_at_all() -> None:
    torch.manual_seed(0)
    teacher, student = unbiased.teacher(384).eval(), unbiased.Compared(3)
    student.load_state_dict(teacher.state_dict())
    pictures = torch.rand(2, 3, 384, 384)
    looked = []
    for network in (teacher, student):
        network.aggregate = lambda places, own=network.aggregate: looked.append(len(places)) or own(places)
    with torch.no_grad():
        told = teacher(pictures)
    said = student.train()(pictures)
    assert told.shape == said.shape == (2, 2 * 96)
    assert looked == [9, 9, 3, 3]
    said.sum().backward()
    assert student.mixture.grad.abs().sum() > 0, "the choice learns"
    assert student.scorer.embedding.weight.grad.abs().sum() > 0
    assert student.patches.embedding.weight.grad.abs().sum() > 0


def test_a_vit_tiny_begins_both_of_scorenets(made: Path, out: Path) -> None:
    done = work(out, epochs=1)
    head = load_head("scorenet", weights=str(done.weights))
    for part in (head.scorer, head.patches):
        assert all(torch.equal(a, b) for a, b in zip(
            part.state_dict().values(), head.scorer.state_dict().values(), strict=True))  # fmt: skip
    kept = load_encoder(ARCH, done.weights).load()._network.state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(kept[key], head.scorer.state_dict()[key]) for key in kept)


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    save_file({"scorer.embedding.weight": torch.zeros(3)}, tmp_path / "w.safetensors")
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(ValueError, match="holds neither its weights without a classifier"):
        load_head("scorenet", weights=str(tmp_path / "w.safetensors"))
    for name in ("text.pt", "missing"):
        with pytest.raises(ValueError, match="no safetensors file that can be read"):
            load_head("scorenet", weights=str(tmp_path / name))


# -- what stops it --


def test_a_loss_that_is_not_finite_stops_and_keeps_what_was(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work(out, epochs=3, name="x", on_epoch=lambda course: None)
    monkeypatch.setattr(dino.Pretraining, "_step", lambda self, *_: torch.tensor(float("nan")))
    with pytest.raises(RunStopped, match="not finite"):
        work(out, name="y")


@pytest.mark.slow
def test_two_processes_of_torchrun(made: Path, out: Path) -> None:
    script = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "from test_pretraining import ARCH, SMALL, dino, pretrain\n"
        "dino.RECIPES[ARCH] = SMALL\n"
        "done = pretrain(sys.argv[3], arch=ARCH, tiles_per_epoch=24, epochs=2, labels=sys.argv[4], patience=5)\n"
        "print('losses', done.course.losses, 'watched', done.course.watched)\n"
    )
    here = Path(__file__).parent
    (out / "script.py").write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, out / "script.py", here, here.parents[1], out, made / "labels.csv"],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("losses")]
    assert len(lines) == 2
    assert lines[0] == lines[1], "both know the curve"
    about = json.loads((out / "pretrained" / ARCH / "pretrained.json").read_text())
    assert about["processes"] == 2
    with pytest.raises(UsageError, match="processes: 2 → 1"):
        work(out, epochs=2, labels=made / "labels.csv", patience=5)

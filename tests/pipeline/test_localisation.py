"""`evaluate` on stores whose scores are planted, where every figure is known; and on slides, from the command line."""

import csv
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from heads import load_head
from pipeline.cli import main
from pipeline.demo import write_slide
from pipeline.draw import ANNOTATED, MARGIN
from pipeline.errors import UsageError
from pipeline.localisation import COLUMNS, COUNTS, MEANS, RATES, REGIONS, evaluate
from pipeline.prediction import save_model
from pipeline.quadtree import build_quadtree
from pipeline.readers import open_slide
from pipeline.store import BagStore
from pipeline.tissue import TissueMask

GLAS = Path(__file__).parents[2].parent / "shared" / "data" / "tiles" / "GlaS"
SIZE, MPP, TILE = (1000, 600), 0.5, 100  # 10 × 6 tiles

PLANTED = '''
import torch
from heads import Bag, Head, Prediction, TileScores


class Planted(Head):
    """A tile's one feature is its raw score. energy: of bags, as HATNet has them."""

    def __init__(self, dim, classes, *, energy=()):
        super().__init__(dim, classes, energy=energy)
        self.logits = torch.nn.Parameter(torch.zeros(classes))

    def forward(self, bag):
        self.check(bag)
        raw = bag.valid_features[:, 0]
        tiles = TileScores.place(bag.valid, raw, raw.softmax(0))
        energy = self.options["energy"]
        parts = {"bag_energy": torch.tensor(energy)} if energy else {}
        return Prediction(self.logits, raw.mean()[None], (tiles,), parts=parts)


build = Planted
'''


@dataclass(frozen=True)
class Planted:
    """An output folder, of which the scores are known."""

    out: Path
    annotations: Path

    @property
    def folder(self) -> Path:
        return self.out / "evaluations" / "planted"

    def slide(self, name: str, best: tuple[int, int, int, int], status="complete") -> None:
        """The tiles inside of `best` (columns and rows: x0, y0, x1, y1) have the highest scores, one by one."""
        tree = build_quadtree(
            open_slide(np.zeros((SIZE[1], SIZE[0], 3), np.uint8), mpp=MPP),
            TissueMask(np.ones((6, 10), bool), (TILE, TILE), 50.0, "t"),
            mpp=MPP, tile_px=TILE, levels=1,
        )  # fmt: skip
        group = BagStore(self.out).group(name)
        about = {"path": name, "width": SIZE[0], "height": SIZE[1]}
        group.begin(slide=about, scale={"mpp": MPP, "warnings": []})
        mask = TissueMask(np.ones((60, 100), bool), (10, 10), 5.0, "t")
        group.write_tissue(mask, np.full((60, 100, 3), 255, np.uint8), "h")
        group.write_tiles(tree)
        columns, rows = tree.grid.T
        inside = (columns >= best[0]) & (columns < best[2]) & (rows >= best[1]) & (rows < best[3])
        x = (inside * 2 + np.linspace(0, 1, len(tree)))[:, None].astype(np.float32)
        features = group.features("mine")
        features.begin(len(tree), 1, "float32", feature_hash="f", tiles=tree.hash)
        features.write_chunk(0, x, np.ones(len(tree), bool))
        features.finish()
        if status != "writing":
            group.finish(status)

    def annotate(self, name: str, *boxes: tuple[int, int, int, int]) -> Path:
        """Boxes of tiles, as GeoJSON, ASAP XML or a mask that is ten times smaller."""
        path = self.annotations / name
        path.parent.mkdir(parents=True, exist_ok=True)
        corners = [[TILE * v for v in box] for box in boxes]
        rings = [[[x0, y0], [x1, y0], [x1, y1], [x0, y1]] for x0, y0, x1, y1 in corners]
        if path.suffix == ".geojson":
            path.write_text(json.dumps([{"type": "Polygon", "coordinates": [ring]} for ring in rings]))
        elif path.suffix == ".xml":
            points = ["".join(f'<Coordinate X="{x}" Y="{y}"/>' for x, y in ring) for ring in rings]
            shapes = "".join(f'<Annotation Type="Polygon">{each}</Annotation>' for each in points)
            path.write_text(f"<ASAP>{shapes}</ASAP>")
        else:
            image = np.zeros((SIZE[1] // 10, SIZE[0] // 10), np.uint8)
            for x0, y0, x1, y1 in corners:
                image[y0 // 10 : y1 // 10, x0 // 10 : x1 // 10] = 255
            Image.fromarray(image).save(path)
        return path

    def table(self) -> dict[str, dict[str, str]]:
        with open(self.folder / "annotations.csv", newline="") as file:
            return {row["slide"]: row for row in csv.DictReader(file)}

    def summary(self) -> dict:
        return json.loads((self.folder / "annotations.json").read_text())

    def evaluate(self, **options):
        return evaluate(self.out, "planted", self.annotations, **options)


@pytest.fixture
def planted(tmp_path, monkeypatch):
    (tmp_path / "planted_head.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(tmp_path)
    made = Planted(tmp_path / "out", tmp_path / "annotations")
    made.annotations.mkdir()
    about = {"head": "planted_head:build", "options": {}, "dim": 1, "classes": ["a", "b"], "level": MPP,
             "encoder_key": "mine", "feature_hash": "f", "encoded_mpp": [MPP],
             "training": {"slides": {"train": ["b.svs"]}}}  # fmt: skip
    save_model(made.out / "models/planted", load_head("planted_head:build", 1, 2), about)
    (made.out / "run.json").write_text(json.dumps({"root": str(tmp_path / "slides")}))
    yield made
    sys.modules.pop("planted_head", None)


CORNER = (0, 0, 2, 3)  # 6 of 60 tiles


@pytest.mark.parametrize("name", ["a.geojson", "a.xml", "a_mask.png"])
def test_figures_of_a_slide_are_those_that_were_planted(planted, name):
    planted.slide("case/a.svs", CORNER)
    planted.annotate(f"case/{name}", CORNER)
    found = planted.evaluate()
    assert found.exit_code == 0
    row = planted.table()["case/a.svs"]
    assert (row["status"], row["message"]) == ("done", "")
    assert [row[name] for name in COUNTS] == ["60", "60", "6", "0", "0"]
    assert row["annotation"] == str(planted.annotations / "case" / name)
    assert float(row["auc_weight"]) == float(row["auc_raw"]) == 1
    assert [float(row[f"dice_{k}"]) for k in (10, 20, 60)] == pytest.approx([1, 12 / 18, 12 / 42], abs=1e-5)
    assert float(row["annotated_share"]) == pytest.approx(0.1)
    assert row["hit_rate"] == ""
    assert set(row) == set(COLUMNS)
    means = planted.summary()["means"]
    assert means["dice_20"] == {"value": pytest.approx(12 / 18), "low": None, "high": None, "slides": 1}
    assert "hit_rate" not in means


def test_the_hit_rate_of_chosen_regions(planted):
    """2 × 2 bags of 5 × 3 tiles, of which the head chooses two; 6 of the 15 tiles of the first are annotated."""
    path = planted.out / "models/planted/model.json"
    about = json.loads(path.read_text()) | {"options": {"energy": [4.0, 1.0, 2.0, 3.0]}}
    path.write_text(json.dumps(about))
    planted.slide("a.svs", CORNER)
    planted.slide("b.svs", CORNER)
    planted.annotate("a.geojson", CORNER)
    planted.annotate("b.geojson", (5, 0, 10, 6))
    found = planted.evaluate(threshold=0.4)
    rows = planted.table()
    assert [rows["a.svs"][name] for name in (*REGIONS, *RATES)] == ["4", "2", "0.5", "0.25", "0.5", "0.25"]
    assert [rows["b.svs"][name] for name in RATES] == ["0.5"] * 4
    assert found.means["hit_rate_of_all"].value == pytest.approx(0.375)
    assert any(line.split()[:2] == ["hit_rate", "0.500"] for line in found.lines())
    planted.evaluate()
    assert [planted.table()["a.svs"][name] for name in RATES] == ["0.5", "0.25", "0", "0"]


def test_a_shifted_annotation_lowers_the_figures(planted):
    planted.slide("a.svs", CORNER)
    planted.annotate("a.geojson", (1, 1, 3, 4))
    means = planted.evaluate().means
    assert means["dice_10"].value == pytest.approx(2 * 2 / 12)
    assert 0.2 < means["auc_weight"].value < 0.9


@pytest.fixture
def cohort(planted):
    """Slides: found, missed, all annotated, not annotated, empty, unfinished."""
    for name in ("a.svs", "b.svs", "c.svs", "d.svs"):
        planted.slide(name, CORNER)
    planted.slide("e.svs", CORNER, status="empty")
    planted.slide("f.svs", CORNER, status="writing")
    planted.annotate("a.geojson", CORNER)
    planted.annotate("b.xml", (2, 0, 4, 3))
    planted.annotate("c.png", (0, 0, 10, 6))
    planted.annotate("e.xml", CORNER)
    planted.annotate("f.xml", CORNER)
    planted.annotate("z.xml", CORNER)
    return planted


def test_every_slide_has_a_row_and_what_became_of_it(cohort):
    found = cohort.evaluate()
    assert {slide: row["status"] for slide, row in cohort.table().items()} == {
        "a.svs": "done", "b.svs": "done", "c.svs": "done", "d.svs": "skipped", "e.svs": "empty", "f.svs": "failed",
    }  # fmt: skip
    rows = cohort.table()
    assert rows["d.svs"]["message"] == "no annotation"
    assert "no tissue" in rows["e.svs"]["message"]
    assert "run `slidestream run` again" in rows["f.svs"]["message"]
    assert found.exit_code == 3
    assert found.notes == (
        "1 annotations are of no slide here: z.xml.",
        "1 of these slides have names that planted was trained on: b.svs",
    )
    summary = cohort.summary()
    assert summary["slides"] == {"done": 3, "skipped": 1, "empty": 1, "failed": 1}
    assert summary["counts"] == {"tiles": 180, "looked_at": 180, "positive": 72, "regions": 0, "chosen": 0}
    assert summary["settings"] == {"threshold": 0.5, "score": "weight", "patients": None}
    assert summary["notes"] == list(found.notes)
    assert summary["versions"]["slidestream"]


def test_means_are_over_the_slides_for_which_a_figure_is_defined(cohort):
    found = cohort.evaluate()
    rows = cohort.table()
    assert float(rows["a.svs"]["auc_weight"]) == 1
    assert float(rows["b.svs"]["auc_weight"]) < 0.5
    for name, slides in (("auc_weight", "ab"), ("dice_30", "abc")):
        values = [float(rows[f"{slide}.svs"][name]) for slide in slides]
        assert found.slides[name] == len(slides)
        assert found.means[name].value == pytest.approx(np.mean(values), abs=1e-5)
        assert found.means[name].low == pytest.approx(min(values), abs=1e-5)  # three slides: all draws lie between
        assert found.means[name].high == pytest.approx(max(values), abs=1e-5)
    assert rows["c.svs"]["auc_weight"] == ""
    assert rows["c.svs"]["positive"] == "60"
    assert set(found.means) == set(MEANS) - {name for name in MEANS if "rate" in name}


def test_slides_of_one_patient_are_drawn_together(cohort, tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("slide,label,patient\na,x,p\nb.svs,y,p\nz,x,q\n")
    found = cohort.evaluate(patients=table)
    assert f"{table}: 3 annotated slides have no patient: c.svs, e.svs, f.svs." in found.notes
    assert np.isnan(found.means["auc_raw"].low), "a and b alone have an AUC, and they are one patient's"
    both = np.mean([float(cohort.table()[s]["dice_30"]) for s in ("a.svs", "b.svs")])
    alone = float(cohort.table()["c.svs"]["dice_30"])
    assert (found.means["dice_30"].low, found.means["dice_30"].high) == pytest.approx(sorted((both, alone)), abs=1e-5)
    assert cohort.summary()["settings"]["patients"] == str(table)


def test_the_same_call_writes_the_same_bytes(cohort):
    def written():
        return {p.relative_to(cohort.folder): p.read_bytes() for p in cohort.folder.rglob("*") if p.is_file()}

    cohort.evaluate()
    first = written()
    assert {str(path) for path in first} == {
        "annotations.csv",
        "annotations.json",
        "a.svs.png",
        "b.svs.png",
        "c.svs.png",
    }
    cohort.evaluate()
    assert written() == first
    assert not list(BagStore(cohort.out).group("a.svs").path.glob("predictions/*")), "the store stays as it is"


def test_the_threshold_and_the_score(cohort):
    cohort.annotate("b.xml", (0, 0, 0.3, 1))  # 30 % of one tile
    assert cohort.evaluate().means["auc_weight"].value == 1
    assert cohort.table()["b.svs"]["positive"] == "0"
    cohort.evaluate(threshold=0.3, score="raw")
    assert cohort.table()["b.svs"]["positive"] == "1"
    assert cohort.summary()["settings"] == {"threshold": 0.3, "score": "raw", "patients": None}


def test_the_picture_has_the_outline_where_it_is_annotated(planted):
    planted.slide("a.svs", CORNER)
    planted.annotate("a.geojson", (2, 1, 5, 3))
    planted.evaluate()
    picture = cv2.imread(str(planted.folder / "a.svs.png"))[MARGIN:, :, ::-1]
    assert picture.shape == (960, 1600, 3)
    rows, columns = np.nonzero((picture == ANNOTATED).all(axis=2))
    scale = 1.6 * TILE
    corners = np.array([columns.min(), rows.min(), columns.max(), rows.max()]) / scale
    np.testing.assert_allclose(corners, [2, 1, 5, 3], atol=0.02)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_all_damaged_annotations_are_told_before_anything_is_done(cohort):
    for name in ("a.geojson", "b.xml", "f.xml"):
        (cohort.annotations / name).write_text("{")
    Image.fromarray(np.zeros((50, 50), np.uint8)).save(cohort.annotations / "c.png")
    with pytest.raises(UsageError) as caught:
        cohort.evaluate()
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert all(any(name in line for line in lines) for name in ("a.geojson", "b.xml", "c.png", "f.xml"))
    assert "50 x 50" in str(caught.value)
    assert "1000 x 600" in str(caught.value)
    assert not cohort.folder.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threshold": 0.0}, "--threshold"),
        ({"threshold": 1.5}, "--threshold"),
        ({"score": "attention"}, "--score must be one of weight, raw"),
        ({"folds": True}, "holds no models of folds"),
        ({"patients": "none.csv"}, "none.csv"),
    ],
)
def test_settings_that_cannot_be(cohort, options, words):
    with pytest.raises(UsageError, match=words):
        cohort.evaluate(**options)
    assert not cohort.folder.exists()


def test_two_patients_of_one_slide_are_refused(cohort, tmp_path):
    (tmp_path / "p.csv").write_text("slide,patient\na,p\na.svs,q\n")
    with pytest.raises(UsageError, match=r"two patients of a\.svs: p and q"):
        cohort.evaluate(patients=tmp_path / "p.csv")


def test_features_of_no_slide_fit(cohort):
    path = cohort.out / "models/planted/model.json"
    path.write_text(path.read_text().replace('"feature_hash": "f"', '"feature_hash": "g"'))
    with pytest.raises(
        UsageError, match=r"no annotated slide can be evaluated.*the model was trained on features of mine"
    ):
        cohort.evaluate()
    assert not cohort.folder.exists()


def test_a_folder_that_is_none_of_ours(tmp_path):
    with pytest.raises(UsageError, match="is no output folder"):
        evaluate(tmp_path, "m", tmp_path)


# --- from the command line --------------------------------------------------------------------------------------------


def call(monkeypatch, capsys, command: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["slidestream", *command.split()])
    monkeypatch.setattr(sys, "path", list(sys.path))
    for stream in ("stdout", "stderr"):
        if not hasattr(getattr(sys, stream), "reconfigure"):
            monkeypatch.setattr(getattr(sys, stream), "reconfigure", lambda **_: None, raising=False)
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    return end.value.code, out + err


def test_the_command_tells_a_table(cohort, monkeypatch, capsys):
    command = f"evaluate {cohort.out} -m planted -a {cohort.annotations}"
    code, text = call(monkeypatch, capsys, command)
    assert code == 3
    assert "3 slides with annotations, 1 without; 72 of 180 tiles are positive, 180 were looked at" in text
    assert "failed  f.svs" in text
    assert "note: 1 annotations are of no slide here: z.xml." in text
    assert "nan" not in text
    (cohort.annotations / "b.xml").write_text("<")
    code, text = call(monkeypatch, capsys, command)
    assert code == 1
    assert "b.xml" in text


def nested(folder: Path) -> tuple[Path, Path]:
    """Six slides of pink tissue; every other one has a violet square in it, which is annotated. Slides, labels."""
    rows = ["slide,label"]
    for i in range(6):
        rng = np.random.default_rng(i)
        pixels = np.full((512, 640, 3), 243, np.uint8)
        pixels[64:448, 64:576] = (225, 150, 190)
        x, y = 64 * rng.integers(1, 7), 64 * rng.integers(1, 5)
        if i % 2:
            pixels[y : y + 128, x : x + 128] = (90, 40, 140)
            mask = np.zeros((512 // 4, 640 // 4), bool)
            mask[y // 4 : y // 4 + 32, x // 4 : x // 4 + 32] = True
            (folder / "masks").mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(folder / f"masks/s{i}_mask.png")
        noisy = np.clip(pixels + rng.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8)
        write_slide(folder / f"slides/s{i}.svs", noisy, MPP, downsamples=(), lossless=True)
        rows.append(f"s{i},{i % 2}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder / "slides", folder / "labels.csv"


def test_slides_to_figures_from_the_command_line(tmp_path, monkeypatch, capsys):
    slides, labels = nested(tmp_path)
    out = tmp_path / "out"
    for command in (
        f"run {slides} -o {out} -e lab_lbp --mpp 0.5 --levels 1 --tile-px 64 --workers 1",
        f"train {out} --labels {labels} --head maxscore --epochs 40 --lr 1e-3 --keep last --name m",
        f"evaluate {out} -m m -a {tmp_path / 'masks'}",
    ):
        code, text = call(monkeypatch, capsys, command)
        assert code == 0, text
    summary = json.loads((out / "evaluations/m/annotations.json").read_text())
    assert summary["slides"] == {"skipped": 3, "done": 3}
    assert summary["counts"]["positive"] == 3 * 4
    assert summary["means"]["auc_raw"]["value"] == 1
    with open(out / "evaluations/m/annotations.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "done"]
    for row in rows:
        best = -(-int(row["tiles"]) // 10)
        assert float(row["dice_10"]) == pytest.approx(2 * 4 / (best + 4), abs=1e-5)


@pytest.mark.skipif(not GLAS.is_dir(), reason="needs the GlaS images of ../shared/data")
def test_glas(tmp_path, monkeypatch, capsys):
    grades = {row["name"]: row["grade (GlaS)"].strip() for row in csv.DictReader(open(GLAS / "Grade.csv"))}  # noqa: SIM115
    names = [name for grade in ("benign", "malignant") for name in sorted(grades) if grades[name] == grade]
    names = sorted({*names[:3], *names[-3:], "train_7", "train_12"})  # two of them are smaller than the rest
    (tmp_path / "slides").mkdir()
    for name in names:
        shutil.copy(GLAS / f"{name}.jpg", tmp_path / "slides")
    (tmp_path / "mpp.csv").write_text("slide,mpp\n" + "".join(f"{name},0.62\n" for name in names))
    (tmp_path / "labels.csv").write_text("slide,label\n" + "".join(f"{name},{grades[name]}\n" for name in names))
    out = tmp_path / "out"
    recipe = f"-e lab_lbp --mpp 0.62 --levels 1 --tile-px 64 --workers 1 --mpp-csv {tmp_path / 'mpp.csv'}"
    for command in (
        f"run {tmp_path / 'slides'} -o {out} {recipe}",
        f"train {out} --labels {tmp_path / 'labels.csv'} --head abmil --epochs 3 --name m",
        f"evaluate {out} -m m -a {GLAS}",
    ):
        code, text = call(monkeypatch, capsys, command)
        assert code == 0, text
    with open(out / "evaluations/m/annotations.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["slide"] for row in rows] == sorted(f"{name}.jpg" for name in names)
    for row in rows:
        truth = np.asarray(Image.open(GLAS / f"{Path(row['slide']).stem}_anno.png")) > 0
        for name in MEANS:
            assert "rate" in name or 0 <= float(row[name]) <= 1, (row["slide"], name)
        assert float(row["annotated_share"]) == pytest.approx(truth.mean(), abs=1e-5)
        positive = 0
        for column, r in BagStore(out).group(row["slide"]).tree().grid.tolist():  # naively, by its pixels
            positive += truth[r * 64 : r * 64 + 64, column * 64 : column * 64 + 64].mean() >= 0.5
        assert int(row["positive"]) == positive
        picture = cv2.imread(str(out / f"evaluations/m/{row['slide']}.png"))[MARGIN:, :, ::-1]
        red = (picture == ANNOTATED).all(axis=2).astype(np.uint8)
        large = cv2.resize(truth.astype(np.uint8), picture.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        border = cv2.morphologyEx(np.pad(large, 3), cv2.MORPH_GRADIENT, np.ones((7, 7), np.uint8))[3:-3, 3:-3]
        assert red.sum() > 500
        assert (border[red > 0] > 0).all(), "the outline lies on the borders of the mask"

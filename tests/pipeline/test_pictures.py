"""Heads of pixels: what is read of a slide, images in folders, training and predicting from them."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from heads import load_head
from pipeline import BagStore, open_slide, predict, run, train
from pipeline.cohort import read_cohort
from pipeline.errors import BrokenBag, UsageError
from pipeline.pictures import ImageFolder, Region
from pipeline.slide import Box

pytestmark = pytest.mark.usefixtures("_few_draws")
SCORENET = {"k": 2, "draws": 10, "epochs": 2, "lr": 1e-3}


def coarse_noise(height: int, width: int, seed: int = 0, grain: int = 32) -> np.ndarray:
    random = np.random.default_rng(seed)
    cells = random.integers(0, 256, (-(-height // grain), -(-width // grain), 3), dtype=np.uint8)
    return cells.repeat(grain, 0).repeat(grain, 1)[:height, :width]


def images(root: Path, count: int = 8, side: int = 256) -> Path:
    """Two folders: in `ill` there are dark places."""
    random = np.random.default_rng(0)
    for i in range(count):
        pixels = random.integers(150, 255, (side, side + 40, 3), dtype=np.uint8)
        if i % 2:
            pixels[: side // 2, : side // 2] //= 4
        folder = root / ("ill" if i % 2 else "well")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def pyramid(path: Path, pixels: np.ndarray) -> Path:
    """Tiled, levels at 1 and 1/8, 0.25 µm/px."""
    small = pixels.reshape(pixels.shape[0] // 8, 8, pixels.shape[1] // 8, 8, 3).mean((1, 3)).round().astype(np.uint8)
    how = {"tile": (256, 256), "photometric": "rgb", "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, resolution=(40000, 40000), **how)
        file.write(small, resolution=(5000, 5000), subfiletype=1, **how)
    return path


# -- what is read --


def test_a_region_says_what_the_picture_in_memory_says():
    """Same crops, parts and thumbnail, of a part of a slide that begins anywhere."""
    image = coarse_noise(600, 500)
    region = Region(open_slide(image, mpp=0.5), 0.5, Box(37, 21, 400, 530))
    picture = region.whole()
    assert region.size == picture.size == (530, 400)
    assert np.array_equal(picture.pixels.permute(1, 2, 0).numpy(), image[21:551, 37:437])
    rows = torch.tensor([0, 2, 7])
    for one, other in zip((region, region.trimmed(128)), (picture, picture.trimmed(128)), strict=True):
        assert one.size == other.size
        assert torch.equal(one.crops(rows, 128), other.crops(rows, 128))
        torch.testing.assert_close(one.thumbnail(8), other.thumbnail(8), atol=0.51 / 255 / 256, rtol=0)
        torch.testing.assert_close(one.parts(rows, 3, 40), other.parts(rows, 3, 40))


def test_a_region_at_a_coarser_scale_is_the_mean():
    image = coarse_noise(512, 512)
    picture = Region(open_slide(image, mpp=0.25), 1.0).whole()
    expected = image.reshape(128, 4, 128, 4, 3).mean((1, 3))
    assert np.abs(picture.pixels.permute(1, 2, 0).numpy() - expected).max() <= 0.5


def test_what_is_small_comes_from_a_small_level(tmp_path):
    """A head of 2 places reads those and an eighth of both sides, not the slide."""
    path = pyramid(tmp_path / "a.tif", coarse_noise(2048, 1024))
    torch.manual_seed(0)
    head = load_head("scorenet", classes=2, k=2).eval()
    with open_slide(path) as slide, torch.no_grad():
        region = Region(slide, 0.25, name="a")
        streamed = head(region)
        read = region.cost.pixels
        in_memory = head(region.whole())
    assert read == 2048 * 1024 // 64 + 2 * 128 * 128
    assert torch.equal(streamed.parts["chosen"], in_memory.parts["chosen"])
    torch.testing.assert_close(streamed.logits, in_memory.logits, atol=2e-3, rtol=0)  # its level is rounded to grey


def test_what_is_too_large_to_be_held_is_said(monkeypatch):
    monkeypatch.setattr("pipeline.pictures.MAX_PIXELS", 1000)
    with pytest.raises(BrokenBag, match=r"100 x 90 px are too many .* coarser --level"):
        Region(open_slide(coarse_noise(90, 100), mpp=1.0), 1.0, name="a").whole()


# -- folders of images --


def test_the_folder_of_an_image_is_its_class(tmp_path):
    cohort = read_cohort(images(tmp_path), None)
    assert cohort.targets.names == ("ill", "well")
    assert cohort.units[:2] == ["ill/1.png", "ill/3.png"]
    picture = cohort.bags(None, True)[0]
    assert picture.size == (256, 296)
    assert np.array_equal(picture.pixels.permute(1, 2, 0), np.asarray(Image.open(tmp_path / "ill/1.png")))


def test_pictures_that_we_made_are_none_of_the_images(tmp_path):
    images(tmp_path)
    (tmp_path / "models/a").mkdir(parents=True)
    Image.fromarray(coarse_noise(64, 64)).save(tmp_path / "models/a/curves.png")
    assert len(ImageFolder(tmp_path).slides()) == 8


def test_images_in_no_folder_need_a_table(tmp_path):
    images(tmp_path)
    Image.fromarray(coarse_noise(128, 128)).save(tmp_path / "loose.png")
    with pytest.raises(UsageError, match=r"1 images lie in no folder .*loose\.png.*--labels"):
        read_cohort(tmp_path, None)
    (tmp_path / "labels.csv").write_text("slide,label\nill/1.png,a\nloose.png,b\n")
    assert read_cohort(tmp_path, tmp_path / "labels.csv").units == ["ill/1.png", "loose.png"]


def test_heads_read_what_they_are_made_for(tmp_path):
    images(tmp_path)
    with pytest.raises(UsageError, match=r"holds images, but the head reads features: `slidestream run .* -o OUT`"):
        train(tmp_path, head="abmil", epochs=1)
    (tmp_path / "files").mkdir()
    for name in "abcd":
        np.save(tmp_path / f"files/{name}.npy", np.zeros((3, 4)))
    (tmp_path / "files/labels.csv").write_text("slide,label\na,0\nb,1\nc,0\nd,1\n")
    with pytest.raises(UsageError, match="the head reads pixels, so give a folder of images"):
        train(tmp_path / "files", tmp_path / "files/labels.csv", head="scorenet", epochs=1)
    with pytest.raises(UsageError, match="--labels is needed"):
        train(tmp_path / "files", head="abmil")


def test_train_and_predict_a_folder_of_images(tmp_path):
    """Models, predictions and heatmaps beside the images; the same seed makes the same model; a damaged one is told."""
    images(tmp_path, 12)
    trained = train(tmp_path, head="scorenet", name="s", cv=2, **SCORENET)
    assert trained.folder == tmp_path / "models/s"
    assert trained.results["pooled"]["auc"]["value"] >= 0
    first = (trained.folder / "model.safetensors").read_bytes()
    again = train(tmp_path, head="scorenet", name="t", **SCORENET)
    assert (again.folder / "model.safetensors").read_bytes() == first
    Image.fromarray(coarse_noise(64, 64)).save(tmp_path / "ill/small.png")
    (tmp_path / "well/broken.png").write_bytes((tmp_path / "well/0.png").read_bytes()[:3000])
    report = predict(tmp_path, "s")
    assert report.exit_code == 3
    failures = {outcome.slide: outcome.message for outcome in report.failures}
    assert set(failures) == {"ill/small.png", "well/broken.png"}
    assert "64 × 64 px holds no place of 128 px" in failures["ill/small.png"]
    with open(tmp_path / "predictions/s.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["slide"] for row in rows] == sorted(f"{'ill' if i % 2 else 'well'}/{i}.png" for i in range(12))
    assert math.isclose(float(rows[0]["p_ill"]) + float(rows[0]["p_well"]), 1, abs_tol=1e-5)
    assert (tmp_path / "heatmaps/s/ill/1.png.png").is_file()


def test_recipes_of_papers_train_on_images(tmp_path):
    images(tmp_path)
    options = {"side": 2, "width": 16, "heads": 2, "cnn": "test_efficientnet", "cnn_weights": "random", "word_px": 32}
    trained = train(tmp_path, head="hatnet", recipe="paper", epochs=6, augment=True, mix="scoremix", **options)
    about = json.loads((trained.folder / "model.json").read_bytes())
    assert about["training"]["augment"] is True
    assert about["training"]["mix"] == "scoremix"
    assert about["dim"] == 256
    assert predict(tmp_path, "hatnet").exit_code == 0
    with pytest.raises(UsageError, match="mix must be one of none, cutmix"):
        train(tmp_path, head="hatnet", mix="mixup", **options)


# -- slides of an output folder --


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """Eight slides of 0.25 µm/px, with features at 0.5."""
    root = tmp_path_factory.mktemp("pixels") / "slides"
    root.mkdir()
    rows = ["slide,label"]
    for i in range(8):
        image = np.full((1024, 1024, 3), 245, np.uint8)
        image[128:896, 128:896] = coarse_noise(768, 768, i, 16) // (2 if i % 2 else 1) // 2 + 60
        pyramid(root / f"{i}.tif", image)
        rows.append(f"{i}.tif,{i % 2}")
    (root.parent / "labels.csv").write_text("\n".join(rows) + "\n")
    report = run(root, root.parent / "out", encoder="lab_lbp", mpp=0.5, tile_px=64, force_scale=True, workers=1)
    assert report.exit_code == 0
    return root.parent / "out"


def test_slides_are_read_at_the_scale_of_their_tiles(out):
    trained = train(out, out.parent / "labels.csv", head="scorenet", name="s", **SCORENET)
    about = json.loads((trained.folder / "model.json").read_bytes())
    assert about["level"] == 0.5
    cohort = read_cohort(out, out.parent / "labels.csv")
    assert cohort.bags(0.5, True)[0].size == (512, 512)
    assert predict(out, "s").exit_code == 0
    stored = BagStore(out).group("3.tif").prediction("s")
    assert stored["boxes"].shape == (16, 4)
    assert stored["boxes"][5].tolist() == [256, 256, 256, 256]
    assert stored["weight"].sum() == pytest.approx(1, abs=1e-5)
    with open(out / "predictions/s.csv") as file:
        before = file.read()
    elsewhere = predict(
        out.parent / "slides", trained.folder, out.parent / "elsewhere"
    )  # the slides, with no features of them
    assert elsewhere.exit_code == 0
    assert (out.parent / "elsewhere/predictions/s.csv").read_text() == before


def test_heads_of_features_and_of_pixels_are_compared_on_the_same_folds(out):
    from pipeline import compare

    found = compare(out, out.parent / "labels.csv", heads=["mean", "scorenet"], cv=2, epochs=1)
    assert [row["head"] for row in found.rows] == ["mean", "scorenet"]
    assert found.rows[1]["parameters"] > 1_792_900


def test_a_model_of_a_scale_does_not_guess_that_of_images(out, tmp_path):
    train(out, out.parent / "labels.csv", head="scorenet", name="scaled", **SCORENET)
    with pytest.raises(UsageError, match=r"reads 0\.5 µm/px, which images of a folder do not say"):
        predict(images(tmp_path), out / "models/scaled")
    with pytest.raises(UsageError, match="--zoom: scaled reads pixels"):
        predict(images(tmp_path), out / "models/scaled", tmp_path / "out", zoom=True)
    with pytest.raises(UsageError, match="workers: scaled reads pixels in this process"):
        predict(images(tmp_path), out / "models/scaled", tmp_path / "out", workers=2)


def test_other_weights_in_the_same_file_train_folds_again(tmp_path):
    """A file that an option names is known by what is in it, and by its name in the model's folder."""
    import timm

    images(tmp_path)
    options = {"side": 2, "width": 16, "heads": 2, "cnn": "test_efficientnet", "word_px": 32}
    file, said = tmp_path / "cnn.pth", []
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(timm.create_model("test_efficientnet").state_dict(), file)
        trained = train(tmp_path, head="hatnet", name="h", cv=2, epochs=1, cnn_weights=str(file), **options)
        said.append((trained.folder / "fold0/model.safetensors").read_bytes())
        again = train(tmp_path, head="hatnet", name="h", cv=2, epochs=1, cnn_weights=str(file), **options)
        assert (again.folder / "fold0/model.safetensors").read_bytes() == said[-1]
    assert said[0] != said[1]
    about = json.loads((trained.folder / "model.json").read_bytes())
    assert about["training"]["options"]["cnn_weights"] == str(file)


def test_where_a_head_of_pixels_looked_is_judged(out):
    """Of 16 places 2 were read in full, of which one is annotated: places chosen by hand."""
    from pipeline import evaluate
    from pipeline.looks import look_at
    from pipeline.prediction import load_model

    trained = train(out, out.parent / "labels.csv", head="scorenet", name="judged", **SCORENET)
    look = look_at(BagStore(out), "3.tif", load_model(trained.folder))
    assert look.boxes.shape == look.choice.among.shape == (16, 4)
    assert look.choice.chosen.shape == (2, 4)
    assert look.weight.argmax() in [int((look.boxes == box).all(1).argmax()) for box in look.choice.chosen]
    left, top, width, height = look.choice.chosen[0].astype(int)
    mask = np.zeros((1024, 1024), np.uint8)
    mask[top : top + height, left : left + width] = 255
    (out.parent / "masks").mkdir(exist_ok=True)
    Image.fromarray(mask).save(out.parent / "masks/3_mask.png")
    found = evaluate(out, "judged", out.parent / "masks")
    assert found.means["hit_rate"].value == 0.5
    assert found.means["hit_rate_of_all"].value == 1 / 16

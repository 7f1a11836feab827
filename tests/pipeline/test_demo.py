"""The demo's slides, and what a head learns from them."""

import csv

import cv2
import numpy as np
import pytest
from skimage.color import rgb2hed

from pipeline import find_tissue, open_slide
from pipeline.annotations import read_annotation
from pipeline.batch import Silent
from pipeline.demo import make_slides, run_demo, write_slide


def test_slides_are_what_they_say(tmp_path):
    labels = make_slides(tmp_path, 12, seed=3)
    rows = list(csv.DictReader(open(labels, newline="")))  # noqa: SIM115
    assert len(rows) == 12
    for split in ("train", "test"):
        assert {row["label"] for row in rows if row["split"] == split} == {"positive", "negative"}
    scales = set()
    for row in rows[:4]:
        with open_slide(tmp_path / "slides" / row["slide"]) as slide:
            scales.add(slide.mpp)
            assert slide.vendor == "aperio"
            assert len(slide.levels) == 3
            assert 0.2 < find_tissue(slide).image.mean() < 0.6
            found = tmp_path / f"annotations/{row['slide']}".replace(".svs", ".geojson")
            assert found.exists() == (row["label"] == "positive")
            if found.exists():
                brown = _brown(slide)
                nests = read_annotation(found, slide.size, slide.mpp).image
                nests = cv2.resize(nests.astype(np.uint8), brown.shape[::-1], interpolation=cv2.INTER_NEAREST) > 0
                assert brown[nests].mean() > 0.5
                assert brown[~cv2.dilate(nests.astype(np.uint8), np.ones((9, 9))).astype(bool)].mean() < 0.001
    assert scales == {0.25, 0.5}


def _brown(slide) -> np.ndarray:
    """(h, w) bool of the coarsest level: more DAB than tissue has outside of nests."""
    level = slide.levels[-1]
    pixels = cv2.blur(slide.read(0, 0, 2, level.width, level.height), (5, 5))
    return rgb2hed(pixels)[..., 2] > 0.03


def test_the_same_seed_makes_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        make_slides(tmp_path / name, 2, seed=5)
    first, second = ((tmp_path / name / "slides" / "case02.svs").read_bytes() for name in ("a", "b"))
    assert first == second


def test_write_slide_keeps_every_pixel_when_lossless(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (307, 401, 3), dtype=np.uint8)
    write_slide(tmp_path / "s.svs", pixels, 0.25, downsamples=(), lossless=True)
    with open_slide(tmp_path / "s.svs") as slide:
        np.testing.assert_array_equal(slide.read(0, 0, 0, 401, 307), pixels)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_auc(tmp_path, seed):
    lines = run_demo(tmp_path / "demo", 24, seed, Silent())
    assert float(lines[1].split()[2]) >= 0.9, lines
    assert len(list((tmp_path / "demo/out/heatmaps/demo").glob("*.png"))) == 24

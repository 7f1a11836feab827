"""Slides of its own, and the whole line on them: the first command works on any machine, with no download.

The tissue is real: skimage's immunohistochemistry image, cut, turned, recoloured and grown in blobs on noisy glass.
Positive slides have brown-stained nests in a few places; everything else is the same in both classes.
"""

import csv
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
from skimage.color import hed2rgb, rgb2hed
from skimage.data import immunohistochemistry

from .batch import Progress, predict, run
from .training import train

GLASS = 243


def write_slide(
    path: Path,
    pixels: np.ndarray,
    mpp: float,
    *,
    downsamples: tuple[int, ...] = (4, 16),
    tile_px: int = 256,
    quality: int = 90,
    lossless: bool = False,
) -> None:
    """Write (H, W, 3) uint8 as an Aperio-style pyramid: tiled JPEG (or deflate), a thumbnail, MPP and AppMag tags.

    Needs no scanner and no licence: for demos and tests. Levels are area means of the first.
    """
    height, width = pixels.shape[:2]
    head = f"Aperio Image Library v12.0\n{width}x{height} [0,0 {width}x{height}] ({tile_px}x{tile_px})"
    tags = f"|AppMag = {round(10 / mpp)}|MPP = {mpp:g}"
    coding: dict[str, Any] = (
        {"compression": "deflate"} if lossless else {"compression": "jpeg", "compressionargs": {"level": quality}}
    )
    options: dict[str, Any] = {"photometric": "rgb", "metadata": None, "software": False, **coding}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, tile=(tile_px, tile_px), description=head + " JPEG/RGB" + tags, **options)
        small = _shrink(pixels, max(1, max(width, height) // 512))
        line = f"Aperio Image Library v12.0\n{width}x{height} -> {small.shape[1]}x{small.shape[0]} - "
        file.write(small, description=line + tags, **options)
        for factor in downsamples:
            level = _shrink(pixels, factor)
            line = f"{head} -> {level.shape[1]}x{level.shape[0]} JPEG/RGB{tags}"
            file.write(level, tile=(tile_px, tile_px), description=line, subfiletype=1, **options)


def _shrink(pixels: np.ndarray, factor: int) -> np.ndarray:
    height, width = pixels.shape[0] // factor, pixels.shape[1] // factor
    part = pixels[: height * factor, : width * factor]
    return cv2.resize(part, (max(1, width), max(1, height)), interpolation=cv2.INTER_AREA)


def make_slides(folder: Path, count: int, seed: int) -> Path:
    """`count` slides of about 1.5 mm, in folder/slides, and their labels.csv (two thirds train, one third test).

    The nests of positive slides are annotated: folder/annotations/<slide>.geojson.
    """
    texture = _stains()
    rows = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        positive, fine = number % 2 == 1, number % 4 >= 2  # both classes at both resolutions
        mpp = 0.25 if fine else 0.5
        pixels, nests = _slide(texture, positive, rng)
        if fine:
            pixels = cv2.resize(pixels, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
        name = f"case{number + 1:02}.svs"
        if positive:
            _annotate(folder / "annotations" / name, nests, 2 if fine else 1)
        write_slide(folder / "slides" / name, pixels, mpp)
        split = "test" if number // 2 % 3 == 2 else "train"
        rows.append([name, "positive" if positive else "negative", f"patient{number + 1:02}", split])
    labels = folder / "labels.csv"
    with open(labels, "w", newline="") as file:
        csv.writer(file).writerows([["slide", "label", "patient", "split"], *rows])
    return labels


def _stains() -> np.ndarray:
    """Real tissue (512, 512, 3) as the amounts of haematoxylin, eosin and DAB in each pixel."""
    return rgb2hed(immunohistochemistry()).astype(np.float32)


def _slide(stains: np.ndarray, positive: bool, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(H, W, 3) uint8 at 0.5 µm/px, tissue in blobs on noisy glass; (H, W) its nests: only they have DAB."""
    side = int(rng.integers(2700, 3300))
    tissue = _blobs(side, rng)
    hed = _grown(stains, side, rng)
    nests = _nests(tissue, rng) if positive else np.zeros((side, side), np.float32)
    hed[..., 0] *= rng.uniform(0.8, 1.2)
    hed[..., 1] = np.maximum(hed[..., 1], 0) + rng.uniform(0.01, 0.03)
    hed[..., 2] *= rng.uniform(0.0, 0.25) + nests * rng.uniform(0.9, 1.2)
    colour = np.clip(hed2rgb(hed), 0, 1).astype(np.float32) * 255
    glass = np.float32(GLASS) + rng.normal(0, 1.5, (side, side, 1)).astype(np.float32)
    return np.clip(glass + (colour - glass) * tissue[..., None], 0, 255).astype(np.uint8), nests * tissue


def _grown(stains: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """The texture, mirrored over its borders so that it has no seams, then shifted and turned."""
    pad = -(-side // len(stains)) * len(stains)
    large = np.pad(stains, ((0, pad), (0, pad), (0, 0)), mode="symmetric")
    large = np.roll(large, tuple(rng.integers(0, len(large), 2)), (0, 1))[:side, :side]
    return np.ascontiguousarray(np.rot90(large, int(rng.integers(4))))


def _blobs(side: int, rng: np.random.Generator) -> np.ndarray:
    """(side, side) float32 in 0..1: smooth islands of tissue, away from the border."""
    coarse = cv2.GaussianBlur(rng.normal(size=(64, 64)).astype(np.float32), (0, 0), 6)
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    coarse = coarse / coarse.std() - 3.5 * (x**2 + y**2) ** 2
    field = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
    level = np.quantile(field, rng.uniform(0.6, 0.7))
    return np.clip((field - level) * 12, 0, 1).astype(np.float32)


def _nests(tissue: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(side, side) float32 in 0..1: two to four round nests of 80-130 µm radius inside the tissue."""
    out = np.zeros_like(tissue)
    inside = np.argwhere(cv2.erode(tissue[::8, ::8], np.ones((21, 21))) > 0.9) * 8
    for y, x in rng.permutation(inside)[: int(rng.integers(2, 5))]:
        cv2.circle(out, (int(x), int(y)), int(rng.integers(160, 260)), 1.0, -1)
    return cv2.GaussianBlur(out, (0, 0), 6)


def _annotate(slide: Path, nests: np.ndarray, factor: int) -> None:
    """Polygons as QuPath draws them, in level-0 px, which are `factor` times smaller than those of `nests`."""
    outlines, _ = cv2.findContours((nests > 0.5).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    rings = [[*ring, ring[0]] for ring in ((outline[:, 0] * factor).tolist() for outline in outlines) if len(ring) > 2]
    shapes = [{"type": "Polygon", "coordinates": [ring]} for ring in rings]
    features = [{"type": "Feature", "geometry": shape, "properties": {}} for shape in shapes]
    slide.parent.mkdir(parents=True, exist_ok=True)
    slide.with_suffix(".geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def run_demo(folder: Path, slides: int, seed: int, progress: Progress) -> list[str]:
    """The main job on slides made here; returns the lines that say what came out and where to look."""
    folder.mkdir(parents=True, exist_ok=True)
    progress.note(f"making {slides} slides in {folder / 'slides'}")
    labels = make_slides(folder, slides, seed)
    out = folder / "out"
    report = run(folder / "slides", out, encoder="lab_lbp", mpp=0.5, levels=3, progress=progress, redo=True)
    trained = train(out, labels, head="abmil", name="demo", epochs=60, patience=15, lr=1e-3, seed=seed)
    predict(out, "demo")
    auc, tested = trained.metrics["test"]["auc"], int(trained.metrics["test"]["slides"])
    return [
        f"features of {len(report.outcomes)} slides, AB-MIL trained on two thirds of them, the last third predicted",
        f"held-out AUC {auc:.3f} on {tested} slides (accuracy {trained.metrics['test']['accuracy']:.3f}, seed {seed})",
        f"tissue and tiles    {out / 'qc'}",
        f"where it looked     {out / 'heatmaps' / 'demo'}",
        f"predictions         {out / 'predictions' / 'demo.csv'}",
        f"the store           {out / 'slides'} (plain Zarr; zarr.open_group opens a slide)",
        f"next                slidestream status {out}",
        "                    slidestream run YOUR_SLIDES -o YOUR_OUT -e resnet50",
    ]

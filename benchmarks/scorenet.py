"""What looking at a few places saves: ScoreNet against a plain ViT of its width on all of an image.

    python benchmarks/scorenet.py speed
    python benchmarks/scorenet.py area
    python benchmarks/scorenet.py stream benchmarks/out/slides/big_0.svs

speed: images of 1536 × 2048 px, in memory, one at a time, in turn; the plain ViT is ScoreNet's own ViT-tiny (width 96,
8 blocks, the same fused attention) on all 12,288 tokens of 16 px. "all places": ScoreNet with k = 192. Decoding such
an image from JPEG stands apart. area: ScoreNet and the plain ViT against the area of the image. stream: a region of
16,384 × 16,384 px of a slide at its finest level, of which ScoreNet reads the thumbnail and the places it chooses.
"""

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import torch

from heads import load_head
from heads.picture import Picture
from heads.scorenet import ScoreNet, ViTTiny
from pipeline import open_slide
from pipeline.pictures import Region
from pipeline.slide import Box

SIDES = ((512, 512), (1024, 1024), (1536, 2048), (2048, 2048), (4096, 4096), (8192, 8192))
PLAIN_LIMIT = 2048 * 2048  # px: beyond it the plain ViT takes minutes
REGION = 16_384


def image(height: int, width: int) -> np.ndarray:
    cells = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    return cells.repeat(16, 0).repeat(16, 1)


def scorenet(k: int = 20) -> ScoreNet:
    torch.manual_seed(0)
    return load_head("scorenet", classes=7, k=k).eval()


def plain() -> Callable[[Picture], torch.Tensor]:
    torch.manual_seed(0)
    vit, head = ViTTiny().eval(), scorenet()
    return lambda picture: vit.class_tokens(vit.tokens(head._normalised(picture.pixels / 255.0)[None]), 4)[0]


@torch.no_grad()
def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turn(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median of each."""
    for call in calls.values():
        seconds(call)
    taken = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            taken[name].append(seconds(call))
    return {name: float(np.median(values)) for name, values in taken.items()}


def speed(repeats: int) -> None:
    picture = Picture.of(image(1536, 2048))
    jpeg = imagecodecs.jpeg8_encode(image(1536, 2048), level=90)
    few, every, whole = scorenet(), scorenet(k=192), plain()
    calls = {"ScoreNet/4/1, 20 places": lambda: few(picture), "ScoreNet/4/1, all places": lambda: every(picture)}
    taken = in_turn(calls | {"plain ViT": lambda: whole(picture)}, repeats)
    for name, value in taken.items():
        print(f"{name:26} {value:8.4f} s {1 / value:8.2f} images/s  {taken['plain ViT'] / value:6.1f} × the plain ViT")
    print(f"decoding from JPEG         {in_turn({'': lambda: imagecodecs.jpeg8_decode(jpeg)}, repeats)['']:8.4f} s")


def area(repeats: int) -> None:
    few, whole = scorenet(), plain()
    print(f"{'px':>13} {'places':>7} {'ScoreNet s':>11} {'plain s':>9}")
    for height, width in SIDES:
        picture = Picture.of(image(height, width))
        calls: dict[str, Callable[[], object]] = {"few": lambda picture=picture: few(picture)}
        if height * width <= PLAIN_LIMIT:
            calls["plain"] = lambda picture=picture: whole(picture)
        taken = in_turn(calls, repeats)
        other = f"{taken['plain']:9.3f}" if "plain" in taken else "        -"
        print(f"{height:>6}×{width:<6} {height * width // 128**2:>7} {taken['few']:>11.3f} {other}", flush=True)


def stream(path: Path) -> None:
    with open_slide(path) as slide:
        box = Box(*((side - REGION) // 2 for side in slide.size), REGION, REGION)
        region = Region(slide, slide.mpp, box, path.name)
        start = time.perf_counter()
        with torch.no_grad():
            chosen = scorenet()(region).parts["chosen"]
        taken = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    share = region.cost.pixels / REGION**2
    print(
        f"{REGION} × {REGION} px, {REGION**2 // 128**2} places, {len(chosen)} chosen: {taken:.1f} s, peak {peak:.0f} MB"
    )
    print(f"pixels read: {region.cost.pixels:,} = {share:.2%} of the region")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "area", "stream"))
    parser.add_argument("slide", type=Path, nargs="?")
    parser.add_argument("--repeats", type=int, default=3)
    wanted = parser.parse_args()
    if wanted.what == "stream":
        if wanted.slide is None:
            parser.error("stream needs a slide")
        stream(wanted.slide)
    else:
        {"speed": speed, "area": area}[wanted.what](wanted.repeats)


if __name__ == "__main__":
    main()

"""What the line costs beside its parts, in one run: tiles/s end to end, of reading alone, of the encoder alone.

    python benchmarks/spine.py [--side 8192] [--encoders lab_lbp resnet50]

One slide of real tissue at 0.25 µm/px, three levels from 0.5 µm/px, all in this process. The ratio that counts is end
to end ÷ encoder alone: 1 means that nothing but the encoder costs. Prints a table, writes benchmarks/out/spine.json.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from skimage.data import immunohistochemistry

from pipeline.config import make_config
from pipeline.demo import write_slide
from pipeline.encode import BATCH
from pipeline.readers import open_slide
from pipeline.stages import SlideFile, encode, make_recipe, open_encoder, prepare
from pipeline.store import BagStore
from pipeline.stream import stream_tiles


def make_slide(path: Path, side: int) -> None:
    base = immunohistochemistry().astype(np.int16)
    pixels = np.tile(base, (-(-side // 512), -(-side // 512), 1))[:side, :side]
    noise = np.random.default_rng(0).integers(-6, 7, pixels.shape)
    pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    pixels[:, : side // 2] = 243
    write_slide(path, pixels, 0.25, quality=80)


def measure(name: str, slide: SlideFile, out: Path) -> dict[str, float | str]:
    config = make_config(encoder=name, weights=None if name == "lab_lbp" else "random")
    encoder = open_encoder(config).load()
    recipe = make_recipe(config, encoder)
    row = prepare(slide, recipe, out)
    tree = BagStore(out).group(slide.name).tree()
    with open_slide(slide.path) as opened:
        started = time.perf_counter()
        tiles = [tile.pixels for tile in stream_tiles(opened, tree)]
        reading = time.perf_counter() - started
    batches = [np.stack(tiles[i : i + BATCH]) for i in range(0, len(tiles), BATCH)]
    encoder.encode(batches[0])
    started = time.perf_counter()
    for batch in batches:
        encoder.encode(batch)
    alone = time.perf_counter() - started
    started = time.perf_counter()
    (done,) = encode([(slide, row)], encoder, out, recipe)
    whole = time.perf_counter() - started
    assert done.status == "done", done
    n = len(tiles)
    return {
        "encoder": name,
        "tiles": n,
        "end to end, tiles/s": n / whole,
        "encoder alone, tiles/s": n / alone,
        "reading alone, tiles/s": n / reading,
        "end to end ÷ encoder alone": alone / whole,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=8192)
    parser.add_argument("--encoders", nargs="+", default=["lab_lbp", "resnet50"])
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slide.svs"
        make_slide(path, wanted.side)
        rows = [measure(name, SlideFile("slide.svs", path), Path(folder) / name) for name in wanted.encoders]
    print(" | ".join(rows[0]))
    for row in rows:
        print(" | ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    place = Path(__file__).parent / "out"
    place.mkdir(exist_ok=True)
    (place / "spine.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

"""Ours. The whole line is measured as the command `slidestream run`, so this has no part `features`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import driving  # first: its clock takes the imports below
import numpy as np

from extractors import load_encoder
from pipeline import stages
from pipeline.config import make_config
from pipeline.readers import open_slide
from pipeline.slide import Thumbnail, thumbnail
from pipeline.worker import set_up_process

CONFIG = make_config(tile_px=driving.TILE_PX, mpp=driving.MPP, levels=3)


def encoder(job: driving.Job) -> Callable[[], object]:
    set_up_process()  # as every worker does
    network = load_encoder("resnet50", job.weights).load("cpu", job.precision)
    tiles = np.random.default_rng(0).integers(0, 256, (driving.BATCH, driving.TILE_PX, driving.TILE_PX, 3), np.uint8)
    return lambda: network.encode(tiles)


def segment(job: driving.Job, path: Path) -> int:
    """Three levels are laid; the tiles counted are those of the finest, as the peers have only those."""

    def read(*what: Any) -> Thumbnail:
        with job.stage("reading"):
            return thumbnail(*what)

    stages.thumbnail = read
    with open_slide(path) as slide:
        mask, _ = stages.segment(slide, CONFIG.tissue)
        finest = stages.tile(slide, mask, CONFIG.tile).levels[-1]
    return finest.stop - finest.start


if __name__ == "__main__":
    driving.main(None, encoder, segment)

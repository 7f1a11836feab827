"""Ours. The whole line is measured as the command `slidestream run`, so this has no part `features`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import driving  # first: its clock takes the imports below
import numpy as np
import torch
from dask.system import CPU_COUNT

from extractors import load_encoder
from pipeline import stages
from pipeline.config import make_config
from pipeline.encode import ON_CPU
from pipeline.lanes import Lanes
from pipeline.readers import open_slide
from pipeline.slide import Thumbnail, thumbnail
from pipeline.stream import stream_tiles
from pipeline.worker import set_up_process

CONFIG = make_config(tile_px=driving.TILE_PX, mpp=driving.MPP, levels=3)


def encoder(job: driving.Job) -> Callable[[], object]:
    set_up_process()  # as every worker does
    network = load_encoder("resnet50", job.weights).load("cpu", job.precision)
    shape = (driving.BATCH, job.tile_px, job.tile_px, 3)
    tiles = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    lanes = Lanes(network, "cpu", CPU_COUNT)
    lanes.__enter__()  # left when the process ends

    def encode() -> None:
        for pending in [lanes.start(part) for part in tiles.split(ON_CPU)]:
            pending.result()

    return encode


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


def feed(path: Path) -> Callable[[], int]:
    """One level, as the peers have."""
    set_up_process()
    with open_slide(path) as slide:
        mask, _ = stages.segment(slide, CONFIG.tissue)
        tree = stages.tile(slide, mask, CONFIG.tile.model_copy(update={"levels": 1}))

    def read() -> int:
        with open_slide(path) as slide:
            return sum(tile.pixels is not None for tile in stream_tiles(slide, tree))

    return read


if __name__ == "__main__":
    driving.main(None, encoder, segment, feed)

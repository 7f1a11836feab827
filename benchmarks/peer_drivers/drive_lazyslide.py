"""LazySlide with wsidata, the loop over the slides that its documentation leaves to the user.

By default `find_tissues` drops brown tissue as an artifact and then tiles the glass too: hence the two settings.
Its transform takes tiles of 256 px to 224 before the network.
"""

from collections.abc import Callable
from pathlib import Path

import driving  # first: its clock takes the imports below
import lazyslide
import torch
import wsidata
from lazyslide_models import TimmModel


def load(weights: Path) -> TimmModel:
    return TimmModel("resnet50", pretrained=False, checkpoint_path=str(weights))


def tiled(wsi: wsidata.WSIData) -> int:
    lazyslide.pp.find_tissues(wsi, to_hsv=True, filter_artifacts=False)
    lazyslide.pp.tile_tissues(wsi, driving.TILE_PX, mpp=driving.MPP)
    return len(wsi.shapes["tiles"])


def features(job: driving.Job) -> int:
    count, model = 0, load(job.weights)
    for slide in job.slides:
        with job.stage("segment and tile"):
            wsi = opened(slide, store=str(job.out))
            count += tiled(wsi)
        with job.stage("encode"):
            lazyslide.tl.feature_extraction(
                wsi,
                model,
                model_name="resnet50",
                device="cpu",
                batch_size=driving.BATCH,
                num_workers=driving.LOADERS,
                pbar=False,
            )
        with job.stage("write"):
            wsi.write()
    return count


def opened(slide: Path, store: str | None) -> wsidata.WSIData:
    return wsidata.open_wsi(str(slide), store=store)


def encoder(job: driving.Job) -> Callable[[], object]:
    model = load(job.weights)
    tiles = torch.randn(driving.BATCH, 3, 224, 224)
    return lambda: model.encode_image(tiles)


def segment(job: driving.Job, slide: Path) -> int:
    wsi = opened(slide, store=None)
    try:
        return tiled(wsi)
    finally:
        wsi.close()


def feed(slide: Path) -> Callable[[], int]:
    wsi = opened(slide, store=None)
    tiled(wsi)

    def read() -> int:
        dataset = wsi.ds.tile_images()
        return sum(dataset[i]["image"].shape[-3:-1] == (driving.TILE_PX,) * 2 for i in range(len(dataset)))

    return read


if __name__ == "__main__":
    driving.main(features, encoder, segment, feed)

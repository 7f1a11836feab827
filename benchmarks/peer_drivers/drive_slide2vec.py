"""slide2vec with hs2p. Its default for tissue, `hsv`, finds none on such slides; so it is `otsu` here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import driving  # first: its clock takes the imports below
import timm
import torch
from hs2p import DEFAULT_MASK_SAMPLING, FilterConfig, SegmentationConfig, SlideSpec, TilingConfig, tile_slide
from slide2vec import (
    ExecutionOptions,
    Model,
    Pipeline,
    PreprocessingConfig,
    TorchTileEncoder,
    register_encoder,
)
from slide2vec.data.dataset import TileIndexDataset
from slide2vec.data.tile_reader import OnTheFlyBatchTileCollator
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader

NAME = "resnet50-of-the-benchmark"
TILING = TilingConfig(
    requested_spacing_um=driving.MPP, requested_tile_size_px=driving.TILE_PX, tolerance=0.05, overlap=0.0
)
TISSUE = SegmentationConfig(method="otsu")


def register(weights: Path) -> type:
    """No preset takes a local file, and none is a ResNet; an encoder of one's own is the way the package offers."""

    @register_encoder(
        NAME,
        encode_dim=2048,
        input_size=driving.TILE_PX,  # what the network gets; of another size tiles are refused
        supports_variable_input_size=False,
        supported_spacing_um=None,
        default_spacing_um=driving.MPP,
        precision="fp32",
    )
    class ResNet50(TorchTileEncoder):
        def __init__(self, *, output_variant: str | None = None) -> None:
            network = timm.create_model("resnet50", pretrained=False, num_classes=0, checkpoint_path=str(weights))
            super().__init__(
                network,
                encode_dim=2048,
                input_size=driving.TILE_PX,
                mean=IMAGENET_DEFAULT_MEAN,
                std=IMAGENET_DEFAULT_STD,
                output_variant=output_variant,
            )

    return ResNet50


def features(job: driving.Job) -> int:
    register(job.weights)
    pipeline = Pipeline(
        Model.from_preset(NAME, device="cpu"),
        PreprocessingConfig(tiling=TILING, segmentation=TISSUE),
        execution=ExecutionOptions(
            output_dir=job.out,
            batch_size=driving.BATCH,
            precision="fp32",
            num_workers_per_gpu=driving.LOADERS,
            num_gpus=1,
        ),
    )
    with job.stage("segment, tile, encode"):
        result = pipeline.run(slides=job.slides)
    return sum(artifact.num_tiles for artifact in result.tile_artifacts)


def encoder(job: driving.Job) -> Callable[[], object]:
    network = register(job.weights)()
    tiles = torch.randn(driving.BATCH, 3, driving.TILE_PX, driving.TILE_PX)

    def encode() -> torch.Tensor:
        with torch.inference_mode():
            return network.encode_tiles(tiles)

    return encode


def tiled(slide: Path) -> Any:
    return tile_slide(
        SlideSpec(sample_id=slide.stem, image_path=slide),
        tiling=TILING,
        segmentation=TISSUE,
        filtering=FilterConfig(ref_tile_size=driving.TILE_PX),  # as slide2vec sets it
        masks=DEFAULT_MASK_SAMPLING,
    )


def segment(job: driving.Job, slide: Path) -> int:
    return tiled(slide).num_tiles


def feed(slide: Path) -> Callable[[], int]:
    """As its embedding loop reads: the default reader, cuCIM, and its super tiles, by one thread."""
    result = tiled(slide)

    def read() -> int:
        collate = OnTheFlyBatchTileCollator(image_path=slide, tiling_result=result, num_cucim_workers=1)
        order, count = collate.ordered_indices, 0
        loader = DataLoader(TileIndexDataset(order), collate_fn=collate, batch_size=driving.BATCH)
        for _, tiles, _ in loader:
            assert tiles.dtype == torch.uint8
            assert tiles.shape[1:] == (3, driving.TILE_PX, driving.TILE_PX)
            count += len(tiles)
        return count

    return read


if __name__ == "__main__":
    driving.main(features, encoder, segment, feed)

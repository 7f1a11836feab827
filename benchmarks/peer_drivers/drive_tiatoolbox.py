"""TIAToolbox. The network gets the tiles with 256 px, and as they are: `CNNBackbone` normalises nothing by itself."""

from collections.abc import Callable
from pathlib import Path

import driving  # first: its clock takes the imports below
import torch
import torchvision
import zarr
from safetensors.torch import load_file
from tiatoolbox.models.architecture.vanilla import CNNBackbone
from tiatoolbox.models.dataset.dataset_abc import WSIPatchDataset
from tiatoolbox.models.engine.deep_feature_extractor import DeepFeatureExtractor

SHAPE = (driving.TILE_PX, driving.TILE_PX)


def load(weights: Path) -> CNNBackbone:
    """timm and torchvision call the parts of a ResNet the same; `CNNBackbone` counts them."""
    whole = torchvision.models.resnet50(weights=None)
    missing = whole.load_state_dict(load_file(weights), strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"], missing
    assert not missing.unexpected_keys, missing
    model = CNNBackbone("resnet50")
    model.feat_extract = torch.nn.Sequential(*list(whole.children())[:-2])
    return model.eval()


def features(job: driving.Job) -> int:
    extractor = DeepFeatureExtractor(
        load(job.weights), batch_size=driving.BATCH, num_workers=driving.LOADERS, device="cpu", verbose=False
    )
    with job.stage("segment, tile, encode"):
        stores = extractor.run(
            job.slides,
            patch_mode=False,
            patch_input_shape=SHAPE,
            stride_shape=SHAPE,
            input_resolutions=[{"units": "mpp", "resolution": driving.MPP}],
            save_dir=job.out,
            output_type="zarr",
        )
    return sum(zarr.open(store, mode="r")["coordinates"].shape[0] for store in stores.values())


def encoder(job: driving.Job) -> Callable[[], object]:
    model = load(job.weights)
    tiles = torch.randint(0, 256, (driving.BATCH, *SHAPE, 3), dtype=torch.uint8)
    return lambda: model.infer_batch(model, tiles, device="cpu")


def tiled(slide: Path) -> WSIPatchDataset:
    return WSIPatchDataset(slide, patch_input_shape=SHAPE, stride_shape=SHAPE, resolution=driving.MPP, units="mpp")


def segment(job: driving.Job, slide: Path) -> int:
    return len(tiled(slide))


def feed(slide: Path) -> Callable[[], int]:
    dataset = tiled(slide)
    return lambda: sum(dataset[i]["image"].shape[:2] == SHAPE for i in range(len(dataset)))


if __name__ == "__main__":
    driving.main(features, encoder, segment, feed)

"""Any model of timm: "timm/resnet18", "timm/vit_small_patch16_224.dino"; and the builder that the postcards share."""

from __future__ import annotations

import difflib
import os
from functools import partial
from typing import TYPE_CHECKING, Any

from . import EncoderError, EncoderFacts, UnknownEncoder
from .network import NetworkEncoder

if TYPE_CHECKING:
    from torch import nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def timm_encoder(
    facts: EncoderFacts,
    architecture: str,
    weights: str | os.PathLike[str] | None,
    drop: tuple[str, ...] = (),
    fold: bool = False,
    **options: Any,
) -> NetworkEncoder:
    """An encoder whose network is `timm.create_model(architecture, **options)` without its classifier."""
    return NetworkEncoder(facts, partial(timm_network, architecture, **options), weights, drop, fold)


def timm_network(architecture: str, **options: Any) -> nn.Module:
    import timm  # the library: imports inside a package are absolute, so this file does not hide it

    network: nn.Module = timm.create_model(architecture, pretrained=False, num_classes=0, **options)
    return network


def build(variant: str, weights: str | os.PathLike[str] | None = None) -> NetworkEncoder:
    import timm

    _check_known(variant)
    config = timm.get_pretrained_cfg(variant)
    facts = _facts(variant, config.to_dict() if config else {})
    classifier = (config.classifier if config else None) or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    fold = timm.models.is_model_in_modules(variant, ["resnet"])  # the others normalise with layers of timm's own
    return timm_encoder(facts, variant, weights, drop=tuple(f"{name}." for name in names), fold=fold)


def _check_known(variant: str) -> None:
    import timm

    known = {*timm.list_models(), *timm.list_pretrained()}
    if variant in known:
        return
    near = difflib.get_close_matches(variant, known, n=3)
    guess = f" Did you mean {' or '.join(f'timm/{name}' for name in near)}?" if near else ""
    raise UnknownEncoder(
        f"timm {timm.__version__} has no model {variant!r}.{guess} All: timm.list_models(pretrained=True)"
    )


def _facts(variant: str, config: dict[str, Any]) -> EncoderFacts:
    tile_px = config.get("input_size", (3, 224, 224))[1]
    hub, file = config.get("hf_hub_id"), config.get("hf_hub_filename") or "model.safetensors"
    return EncoderFacts(
        name=f"timm/{variant}",
        dim=_dim(variant, tile_px),
        tile_px=tile_px,
        any_tile_px=not config.get("fixed_input_size", True),
        mean=tuple(config.get("mean", IMAGENET_MEAN)),
        std=tuple(config.get("std", IMAGENET_STD)),
        # timm publishes no revisions, so this is the one encoder that is not pinned; the sha256 is in the store.
        source=f"{hub}@main:{file}" if hub else "timm names no weights for this model",
        licence=config.get("license") or "unknown: see the model page",
        citation=config.get("paper_ids")
        or config.get("origin_url")
        or "https://github.com/huggingface/pytorch-image-models",
    )


def _dim(variant: str, tile_px: int) -> int:
    """Length of the pooled features: asked of an instance that has shapes but no numbers."""
    import torch

    with torch.device("meta"):
        shape = timm_network(variant).eval()(torch.empty(1, 3, tile_px, tile_px)).shape
    if len(shape) != 2:
        raise EncoderError(
            f"timm/{variant} gives no pooled features, but an array of shape {tuple(shape[1:])} per tile"
        )
    return int(shape[1])

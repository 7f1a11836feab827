"""What works on this machine, in lines for a person."""

import os
import platform
import shutil
from pathlib import Path

import numpy as np

from extractors import EncoderError, list_encoders, load_encoder

from .readers import READERS
from .stages import versions


def examine(encoder: str | None = None, weights: str | None = None) -> tuple[list[str], int]:
    """The lines, and the exit code: 1 if the asked encoder does not work here."""
    import torch

    free = shutil.disk_usage(Path.cwd()).free / 1e9
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    offline = "offline (HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE") else "asked when weights are needed"
    token = "a token is set" if os.environ.get("HF_TOKEN") else "no HF_TOKEN: gated models cannot be fetched"
    lines = [
        f"machine     {platform.platform()}, {os.cpu_count()} cores, {free:.0f} GB free in {Path.cwd()}",
        "versions    " + ", ".join(f"{name} {number}" for name, number in versions().items()),
        f"readers     {', '.join(READERS)}",
        f"GPUs        {', '.join(gpus) or 'none: encoders run on the CPU'}",
        f"hub         {offline}, {token}",
        "encoders    name, features, tile px, µm/px, licence",
    ]
    for name in list_encoders():
        facts = load_encoder(name).facts
        scales = " or ".join(f"{mpp:g}" for mpp in facts.mpp) or "any"
        licence = facts.licence + (" (gated)" if facts.gated else "")
        lines.append(f"            {name:15} {facts.dim:5} {facts.tile_px:4}  {scales:12} {licence}")
    lines.append("            timm/<any timm model>, or module:function of your own")
    return (lines, 0) if encoder is None else _try(encoder, weights, lines)


def _try(name: str, weights: str | None, lines: list[str]) -> tuple[list[str], int]:
    try:
        encoder = load_encoder(name, weights)
        px = encoder.facts.tile_px
        grey = encoder.load().encode(np.full((1, px, px, 3), 128, np.uint8))
    except EncoderError as error:
        return [*lines, f"{name}: does not work here: {error}"], 1
    return [*lines, f"{name}: works here, {grey.shape[1]} features; {encoder.weights_words}"], 0

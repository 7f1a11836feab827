"""What works on this machine, in lines for a person."""

import os
import platform
import shutil
from pathlib import Path

from extractors import EncoderError, list_encoders, load_encoder

from .agreement import cosine_to_fp32, tissue_tiles
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
    import torch

    try:
        encoder = load_encoder(name, weights)
        px = encoder.facts.tile_px
        device = "cuda" if torch.cuda.is_available() else "cpu"
        features = encoder.load(device).encode(tissue_tiles(1, px))
        cosine = cosine_to_fp32(encoder, device, px)
    except EncoderError as error:
        return [*lines, f"{name}: does not work here: {error}"], 1
    half = "" if encoder.precision == "fp32" else f" (cosine to fp32 at least {cosine:.5f})"
    works = f"{name}: works here on {device} in {encoder.precision}{half}, {features.shape[1]} features"
    return [*lines, f"{works}; {encoder.weights_words}"], 0

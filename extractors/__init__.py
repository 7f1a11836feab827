"""Encoders: tiles in, one feature vector per tile out. Usable without the rest of the project.

    from extractors import load_encoder, list_encoders

    encoder = load_encoder("resnet50")        # facts only: nothing is downloaded, no network is built
    encoder.facts.misfit(tile_px=224, finest_mpp=0.5)
    features = encoder.load("cuda").encode(tiles)     # uint8 (B, H, W, 3) → float32 (B, D), on the CPU
    encoder.load("cuda", precision="fp32")            # auto: bf16 (or fp16) where the device computes in it

The file name is the registry. `uni` is the module `extractors/uni.py`, which defines `build(variant, weights)`;
`timm/resnet18` is the module `timm` with the variant `resnet18`; `mypackage.encoders:mine` is a function of your own,
`mine(weights) -> Encoder`. This module and the facts of the postcards need no torch, so listing them is cheap.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import re
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

__all__ = ["Encoder", "EncoderError", "EncoderFacts", "Pending", "UnknownEncoder", "list_encoders", "load_encoder"]

RANDOM = "random"  # in the place of a weights file: an untrained network, the same in every process
MPP_TOLERANCE = 0.1
PRECISIONS = ("auto", "bf16", "fp16", "fp32")


class EncoderError(ValueError):
    """A fault found before any slide is touched: what failed, why, what to do next."""


class UnknownEncoder(EncoderError):
    """No encoder of that name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderFacts:
    """All that is known of an encoder before its weights are read."""

    name: str
    dim: int  # features per tile
    tile_px: int  # tile size it was made for
    any_tile_px: bool = False  # takes any other size as well as that one
    crop_px: int | None = None  # centre crop taken of each tile
    mpp: tuple[float, ...] = ()  # resolutions it was made for, µm per pixel; empty: any
    mean: tuple[float, ...] = ()  # of the channels R, G, B in 0..1
    std: tuple[float, ...] = ()
    source: str  # "hub id@revision:file", or words where nothing is downloaded
    licence: str
    citation: str
    gated: bool = False  # the hub asks for an accepted licence and a token

    def misfit(self, tile_px: int, finest_mpp: float) -> str | None:
        """Why the encoder was not made for such tiles; None if it was."""
        reasons = [reason for reason in (self._misfit_px(tile_px), self._misfit_mpp(finest_mpp)) if reason]
        return f"{self.name} was not made for this: {'; '.join(reasons)}" if reasons else None

    def _misfit_px(self, tile_px: int) -> str | None:
        # A tile that is already as small as the crop has exactly the pixels the crop would leave.
        if self.any_tile_px or tile_px in (self.tile_px, self.crop_px):
            return None
        return f"it takes tiles of {self.tile_px} px, these have {tile_px} px"

    def _misfit_mpp(self, finest_mpp: float) -> str | None:
        if not self.mpp or any(abs(finest_mpp - mpp) <= MPP_TOLERANCE * mpp + 1e-9 for mpp in self.mpp):
            return None
        return f"it expects {' or '.join(f'{mpp:g}' for mpp in self.mpp)} µm/px, the finest level has {finest_mpp:g}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values as JSON gives them back, so that stored facts compare equal."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


class Pending:
    """Features on their way. `result()` waits for them; `seconds` is then how long the device was busy."""

    def __init__(self, features: Tensor, seconds: float) -> None:
        self._features, self.seconds = features, seconds

    def result(self) -> Tensor:
        """float32 (B, dim) on the CPU."""
        return self._features


class Encoder:
    """Facts, weights, `load`, `encode`. A child says how features are made; this class keeps the contract.

    `weights` is the user's wish: None = the published ones, "random", or a file. After `load`, `notes` says what was
    done to the keys of the file, and `precision` what is computed in: bf16, fp16 or fp32.
    """

    parallel = False  # do several threads gain by calling `encode` at a time? On a CPU each core then has its own batch
    precision = "fp32"
    cosine_to_fp32: float | None = None  # of its features, once somebody has measured it

    def __init__(self, facts: EncoderFacts, weights: str | os.PathLike[str] | None = None) -> None:
        self.facts = facts
        self.weights = None if weights is None else os.fspath(weights)
        self.notes: tuple[str, ...] = ()

    @property
    def weights_sha256(self) -> str:
        """Of the weights file; "random"; or "none" where there are no weights. Builds no network."""
        return "none"

    @property
    def weights_words(self) -> str:
        """One sentence for reports."""
        return "no weights: made by hand"

    def load(self, device: str = "cpu", precision: str = "auto", compile: bool = False) -> Self:
        """Read the weights and move to the device; again: nothing more to do.

        precision: bf16, fp16, fp32, or auto, the fastest that the device computes in; what is made by hand knows only
        one. compile: by torch.compile, which takes long for the first batch of each shape.
        """
        return self

    def encode(self, tiles: np.ndarray | Tensor) -> Tensor:
        """uint8 RGB tiles (B, H, W, 3), numpy or torch → float32 features (B, dim) on the CPU."""
        self._check(tiles)
        return self._checked(self._features(tiles), len(tiles))

    def start(self, tiles: Tensor) -> Pending:
        """As `encode`, without waiting for a device that works on its own. Leave `tiles` as they are until `result`."""
        started = perf_counter()
        features = self.encode(tiles)
        return Pending(features, perf_counter() - started)

    def _check(self, tiles: np.ndarray | Tensor) -> None:
        if str(tiles.dtype).removeprefix("torch.") != "uint8":
            raise ValueError(f"{self.facts.name} takes uint8 tiles (0..255), not {tiles.dtype}")
        if tiles.ndim != 4 or tiles.shape[-1] != 3:
            raise ValueError(f"{self.facts.name} takes tiles of shape (B, H, W, 3), not {tuple(tiles.shape)}")
        if self.facts.crop_px and min(tiles.shape[1:3]) < self.facts.crop_px:
            raise ValueError(
                f"{self.facts.name} crops {self.facts.crop_px} px; tiles of {tiles.shape[1:3]} are too small"
            )

    def _checked(self, features: Tensor, tiles: int) -> Tensor:
        if tuple(features.shape) != (tiles, self.facts.dim):
            raise ValueError(
                f"{self.facts.name} gave features of shape {tuple(features.shape)} for {tiles} tiles; "
                f"its facts say {self.facts.dim} per tile. Correct the facts"
            )
        return features

    def _features(self, tiles: np.ndarray | Tensor) -> Tensor:
        raise NotImplementedError


def list_encoders() -> list[str]:
    """Names for `load_encoder`. Besides these: `timm/<any timm model>` and `package.module:function`."""
    names = [path.stem for path in Path(__file__).parent.glob("*.py") if "\ndef build(" in path.read_text("utf-8")]
    return sorted(name for name in names if name != "timm")  # timm alone is a family, not an encoder


def load_encoder(name: str, weights: str | os.PathLike[str] | None = None) -> Encoder:
    """The encoder of that name, facts first: no weights are read before `load()` or `weights_sha256`."""
    if ":" in name:
        return _private(name, weights)
    module, _, variant = name.partition("/")
    # Looked up before it is imported: a name is what a user typed, and importing runs code.
    if module not in [*list_encoders(), "timm"]:
        raise _unknown(name)
    encoder: Encoder = importlib.import_module(f".{module}", __package__).build(variant, weights)
    if encoder.facts.name != name:  # "uni/large": a postcard that has no variants
        raise _unknown(name)
    return encoder


def _unknown(name: str) -> UnknownEncoder:
    known = list_encoders()
    near = difflib.get_close_matches(name.lower(), known, n=1) or difflib.get_close_matches(
        name.split("/")[0], known, n=1
    )
    guess = f" Did you mean {near[0]!r}?" if near else ""
    return UnknownEncoder(
        f"no encoder is called {name!r}.{guess} Known: {', '.join(known)}, timm/<any timm model>, "
        "or your own as package.module:function"
    )


def _private(name: str, weights: str | os.PathLike[str] | None) -> Encoder:
    """`package.module:function` → what `function(weights)` returns, if it looks like an encoder."""
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", name):
        raise UnknownEncoder(f"{name!r} is not of the form package.module:function")
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UnknownEncoder(
            f"{name!r}: cannot import {module_name} ({error}). Is its folder on PYTHONPATH?"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        near = difflib.get_close_matches(function_name, dir(module), n=1)
        raise UnknownEncoder(
            f"{module_name} has no function {function_name!r}." + (f" Did you mean {near[0]!r}?" if near else "")
        )
    encoder = function(weights)
    needed = ("facts", "weights", "weights_sha256", "weights_words", "parallel", "precision", "load", "encode", "start")
    # Looked for on the class as well: asking an instance for weights_sha256 would read the file.
    missing = [attribute for attribute in needed if attribute not in {*dir(type(encoder)), *dir(encoder)}]
    if missing:
        raise EncoderError(
            f"{name} returned {type(encoder).__name__}, which has no {', '.join(missing)}; see extractors.Encoder"
        )
    return encoder

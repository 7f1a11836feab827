"""Tiles of prepared slides through their encoder once more, on a grid that is moved; nothing of them is stored."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from extractors import Encoder, EncoderError

from .cluster import device_name
from .config import make_config
from .encode import Settings, encode_slides
from .errors import BrokenBag, UsageError
from .meter import Meter
from .output import batch_sizes, read_run
from .places import placed
from .prediction import Model
from .quadtree import QuadTree, TreeLevel
from .rows import Held, Work
from .stages import Recipe, SlideFile, is_prepared, make_recipe, open_encoder, tile, work_on
from .store import SlideGroup, read_attrs


class Encoded(NamedTuple):
    """The n tiles of a level; those that were not wanted, or cannot be read, are not valid."""

    features: np.ndarray  # (n, D)
    valid: np.ndarray  # (n,)
    attention: np.ndarray | None  # (n, s, s) within a tile, NaN where there is none
    meter: Meter


class Regrid:
    """The recipe of an output folder, with the encoder of a model.

    within_tiles: features come with the encoder's own attention. Raises UsageError.
    """

    def __init__(
        self, out: Path, model: Model, within_tiles: bool, on_tiles: Callable[[int, Meter], None] = lambda *_: None
    ) -> None:
        self._device = "cuda:0" if torch.cuda.is_available() else "cpu"
        run, own = read_run(out), model.about["recipe"]
        wish = {name: own[name] for name in ("encoder", "weights", "force_scale")}
        try:
            config = make_config(**run["recipe"] | wish)
            plain = open_encoder(config)
            self.recipe: Recipe = make_recipe(config, plain)
            self._encoder = (_attending(plain, self.recipe) if within_tiles else plain).load(self._device)
        except EncoderError as error:
            raise UsageError(str(error)) from error
        if self.recipe.weights_sha256 != model.about["weights_sha256"]:
            raise UsageError(f"{model.name} was trained on features of other weights than the {plain.weights_words}")
        self._root, self._on_tiles = placed(run["root"]), on_tiles
        size = config.batch_size or batch_sizes(out, model.about["encoder_key"]).get(device_name(self._device))
        self._settings = Settings(size, config.readers, torch.get_num_threads(), config.queue_mb << 20)

    def tree(self, group: SlideGroup, tree: QuadTree, moved_px: tuple[float, float]) -> QuadTree:
        """The tiles that the recipe takes of a slide where its grid begins so many level-0 pixels later."""
        config = self.recipe.config
        if config.tiler:
            reason = f"its tiles were chosen by {config.tiler}, whose grid cannot be moved by part of a tile"
            raise BrokenBag(group.slide, "tile", reason)
        origin = tuple(begin + by for begin, by in zip(tree.origin, moved_px, strict=True))
        with self._work(group, tree, np.zeros(0, bool))[0].open() as slide:
            return tile(slide, group.mask(), config.model_copy(update={"origin": origin}).tile)

    def encode(self, group: SlideGroup, tree: QuadTree, level: TreeLevel, seen: np.ndarray) -> Encoded:
        """The `seen` (n,) tiles of a level, in the type in which features are stored. Raises SlideError."""
        key = group.encoder_key(self.recipe.encoder_key)
        self._encoder.load(self._device, read_attrs(group.path / "features" / key)["precision"])
        work, held = self._work(group, tree, np.isin(tree.encoded_rows, level.start + np.flatnonzero(seen)))
        meter = Meter()
        for result in encode_slides([work], self._encoder, self._device, self._on_tiles, self._settings):
            meter += result.meter
            if result.error is not None:
                raise result.error
        x, there = held.read()
        dim = self.recipe.facts.dim
        features, valid = np.zeros((len(seen), dim), x.dtype), seen.copy()
        features[seen], valid[seen] = x[:, :dim], there
        return Encoded(features, valid, _squares(x[:, dim:], self._encoder, seen, valid), meter)

    def _work(self, group: SlideGroup, tree: QuadTree, wanted: np.ndarray) -> tuple[Work, Held]:
        file = SlideFile(group.slide, self._root / group.slide, group.attrs["scale"]["given"])
        if not is_prepared(file, group, self.recipe):
            reason = f"{file.path} is not there, or not the file whose tiles are stored; run `slidestream run` again"
            raise BrokenBag(group.slide, "open", reason)
        held = Held(self.recipe.encoder_key, self.recipe.config.dtype, wanted)
        return work_on(file, group, self.recipe, tree, held), held


def _attending(encoder: Encoder, recipe: Recipe) -> Encoder:
    from extractors.attention import attending  # timm

    return attending(encoder, recipe.config.tile_px or recipe.facts.tile_px)


def _squares(tokens: np.ndarray, encoder: Encoder, seen: np.ndarray, valid: np.ndarray) -> np.ndarray | None:
    if not tokens.shape[1]:
        return None
    side, margin = encoder.side, encoder.margin  # type: ignore[attr-defined]  # of extractors.attention.Attending
    whole = np.full((len(seen), side + 2 * margin, side + 2 * margin), np.nan, np.float32)
    inside = slice(margin, margin + side)
    whole[seen, inside, inside] = tokens.reshape(-1, side, side)
    whole[~valid] = np.nan
    return whole

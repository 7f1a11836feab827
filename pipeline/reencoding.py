"""Some tiles of each slide through their encoder once more, held against the features that are stored.

This sees what no checksum can: features of another slide, of other weights, or of pixels that have changed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from extractors import EncoderError

from .arrays import StoredArray, read_attrs
from .cluster import device_name
from .config import digest, make_config
from .encode import Settings, encode_slides
from .errors import SlideError, UsageError
from .fingerprint import stamp
from .mending import Commands, Finding
from .meter import Meter
from .output import batch_sizes, machine
from .places import placed
from .quadtree import QuadTree
from .rows import Held, Work, nothing_of
from .stages import SlideFile, load_tiler, make_recipe, open_encoder, versions, work_on
from .store import CHUNK_ROWS, BagStore

TILES = 16  # of a slide, or one of each chunk and level where these are more
COSINE = 0.999  # between features that two machines make of a tile in 32 bits; tiles of one slide differ by more


def sample(tree: QuadTree, slide: str) -> np.ndarray:
    """Some of the encoded rows, sorted, and the same ones every time: at least one of each chunk and of each level,
    the others spread evenly."""
    lengths = [tree.scales[k][3] - tree.scales[k][2] for k in tree.encoded_levels]
    rows = sum(lengths)
    edges = sorted({0, rows, *np.cumsum(lengths).tolist(), *range(0, rows, CHUNK_ROWS)})
    evenly = np.linspace(0, rows, max(1, min(TILES + 1 - len(edges), rows)) + 1).astype(int)
    random = np.random.default_rng(int(digest(["sample", slide])[:16], 16))
    spans = [*pairwise(edges), *pairwise(evenly)]
    return np.unique([random.integers(low, high) for low, high in spans if high > low])


@dataclass
class Compared:
    """What came of the tiles of one encoder."""

    encoder: str
    findings: list[Finding] = field(default_factory=list)
    slides: int = 0
    rows: int = 0
    equal: int = 0  # rows, bit by bit
    least: float = 1.0  # cosine
    asked: float = 1.0

    def words(self) -> str:
        if not self.rows:
            return f"nothing was encoded anew by {self.encoder}: no slide is whole and has its features"
        test = "all are the same bits"
        if self.equal < self.rows:
            test = (
                f"{self.equal} are the same bits, the cosine is at least {self.least:.6f} ({self.asked:.4f} is asked)"
            )
        return f"{self.rows} tiles of {self.slides} slides encoded anew by {self.encoder}: {test}"


class Reencoding:
    """An encoder of an output folder, with the recipe of its slides. Raises UsageError where it cannot be had."""

    def __init__(self, out: Path, about: dict[str, Any], key: str, commands: Commands) -> None:
        import torch

        self.key = key
        self._out, self._about, self._commands = out, about, commands
        self._device = "cuda:0" if torch.cuda.is_available() else "cpu"
        told = about["encoders"][key]
        wish = {"encoder": told["name"], "weights": told["weights_file"], "force_scale": told["force_scale"]}
        try:
            config = make_config(**about["recipe"] | wish)
            self._encoder = open_encoder(config)
            self._recipe = make_recipe(config, self._encoder, load_tiler(config.tiler))
            if self._recipe.weights_sha256 != told["weights_sha256"]:
                raise UsageError(f"the {self._encoder.weights_words} are not those that made the features")
        except (EncoderError, UsageError) as error:
            raise UsageError(str(error)) from error
        size = batch_sizes(out, key).get(device_name(self._device))
        self._settings = Settings(size, None, torch.get_num_threads())

    def compare(self, slides: Sequence[str], on_tiles: Callable[[int, Meter], None]) -> Compared:
        """The sample of each slide, by the engine that made what is stored. What cannot be read is a finding."""
        compared = Compared(self.key)
        kinds: dict[tuple[str, bool], list[str]] = {}
        for slide in slides:
            facts = self._facts(slide)
            if facts.get("status") == "complete":
                kinds.setdefault((facts["precision"], facts["compiled"]), []).append(slide)
        for (precision, compiled), some in kinds.items():
            try:
                self._encoder.load(self._device, precision, compiled)
            except EncoderError as fault:
                compared.findings.append(_not_here(self.key, fault))
                return compared
            held: dict[str, _Sampled | SlideError] = {}
            for result in encode_slides(self._works(some, held), self._encoder, self._device, on_tiles, self._settings):
                sampled = held.pop(result.slide)
                error = sampled if isinstance(sampled, SlideError) else result.error
                if error is not None:
                    words = f"its tiles cannot be encoded anew: {error.stage}: {error.reason}"
                    compared.findings.append(Finding(result.slide, "", "failed", words, self._commands.again(self.key)))
                elif isinstance(sampled, _Sampled):
                    self._judge(result.slide, sampled, compared)
        return compared

    def _facts(self, slide: str) -> dict[str, Any]:
        return read_attrs(BagStore(self._out).group(slide).path / "features" / self.key)

    def _works(self, slides: Sequence[str], held: "dict[str, _Sampled | SlideError]") -> Iterator[Work]:
        """Taken from by the thread that opens slides."""
        for slide in slides:
            group = BagStore(self._out).group(slide)
            try:
                tree = group.tree()
                rows = sample(tree, slide)
                wanted = np.zeros(len(tree.encoded_rows), bool)
                wanted[rows] = True
                shelf = Held(self.key, self._recipe.config.dtype, wanted)
                file = SlideFile(slide, placed(self._about["root"]) / slide, group.attrs["scale"]["given"])
                work = work_on(file, group, self._recipe, tree, shelf)
                held[slide] = _Sampled(rows, shelf)
                yield replace(work, unchanged=_Unchanged(file.path))  # a copy has another time than the file had then
            except SlideError as error:
                held[slide] = error
                yield nothing_of(slide)

    def _judge(self, slide: str, sampled: "_Sampled", compared: Compared) -> None:
        """Equal bits where this machine made them; else the cosine."""
        stored, valid = self._stored(slide, sampled.rows)
        made, readable = sampled.shelf.read()
        equal = (made == stored).all(axis=1) & (readable == valid)
        cosine = np.where(equal, 1.0, _cosine(made, stored) * (readable == valid))
        facts = self._facts(slide)
        asked = least_cosine(facts.get("cosine_to_fp32"))
        bits = self._made_here(slide, facts)
        wrong = ~equal if bits else cosine < asked
        compared.slides, compared.rows = compared.slides + 1, compared.rows + len(equal)
        compared.equal += int(equal.sum())
        compared.least, compared.asked = min(compared.least, cosine.min()), min(compared.asked, asked)
        if wrong.any():
            test = "the same bits are asked, as this machine made them" if bits else f"{asked:.4f} is asked"
            words = (
                f"{np.count_nonzero(wrong)} of {len(wrong)} tiles that were encoded anew have other features (cosine "
                f"from {cosine.min():.4f}; {test}), the first in row {sampled.rows[wrong][0]}"
            )
            compared.findings.append(Finding(slide, f"features/{self.key}/x", "damaged", words, self._mend(slide)))

    def _stored(self, slide: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x and valid of some rows; a chunk at a time."""
        path = BagStore(self._out).group(slide).path / "features" / self.key
        x, valid = StoredArray.open(path / "x"), StoredArray.open(path / "valid")
        parts = []
        for chunk in x.chunks:
            at = x.rows(chunk)
            parts.append(np.asarray(x.stored[at])[rows[(rows >= at.start) & (rows < at.stop)] - at.start])
        return np.concatenate(parts), valid.read()[rows]

    def _made_here(self, slide: str, facts: dict[str, Any]) -> bool:
        """True if this machine and these libraries made the features, as far as run.json tells."""
        attrs = BagStore(self._out).group(slide).attrs
        here = self._about.get("hardware") == machine() and attrs["versions"] == versions()
        devices = set(batch_sizes(self._out, self.key)) == {device_name(self._device)}
        elsewhere = any("--scheduler" in made["command"] for made in self._about["commands"])
        return here and devices and not elsewhere and not facts["compiled"]

    def _mend(self, slide: str) -> tuple[str, ...]:
        group = BagStore(self._out).group(slide)
        folders = sorted((group.path / "predictions").glob("*/"))
        hashes = {folder.name: read_attrs(folder).get("feature_hash") for folder in folders}
        own = self._facts(slide)["feature_hash"]
        made = [self._commands.predict(model) for model, value in hashes.items() if value == own]
        return (*self._commands.anew(group.path / "features" / self.key, self.key), *(c for m in made for c in m))


@dataclass(frozen=True)
class _Sampled:
    rows: np.ndarray
    shelf: Held


class _Unchanged:
    """True as long as a file is what it was when it was asked for."""

    def __init__(self, path: Path) -> None:
        self._path, self._before = path, stamp(path)

    def __call__(self) -> bool:
        return stamp(self._path) == self._before


def least_cosine(cosine_to_fp32: float | None) -> float:
    """That two machines' features of a tile must have. Where each is an angle a from what 32 bits would give, they are
    at most 2a apart, and cos 2a = 2 cos² a - 1."""
    return COSINE if cosine_to_fp32 is None else min(COSINE, 2 * cosine_to_fp32**2 - 1)


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n,) of rows; 1 where both are zero."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both = ~a.any(axis=1) & ~b.any(axis=1)
    return np.where(both, 1.0, (a * b).sum(axis=1) / np.maximum(norms, 1e-30))


def reencodings(out: Path, about: dict[str, Any], commands: Commands) -> tuple[list[Reencoding], list[Finding]]:
    """The encoders of a folder that can be had here, and a note of each that cannot. UsageError if none can."""
    there, notes = [], []
    for key in sorted(about["encoders"]):
        try:
            there.append(Reencoding(out, about, key, commands))
        except UsageError as error:
            notes.append(_not_here(key, error))
    if not there:
        told = "; ".join(f"{note.part} {note.message}" for note in notes) or "run.json names no encoder"
        raise UsageError(f"--deep: {told}. Without --deep the store is read all the same")
    return there, notes


def _not_here(key: str, error: Exception) -> Finding:
    return Finding("", f"features/{key}", "note", f"cannot be encoded anew here: {error}")

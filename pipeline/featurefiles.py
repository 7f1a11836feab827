"""Features that other tools made: a folder of CLAM's, TRIDENT's or STAMP's .h5, of .pt tensors, of .npy arrays.

A slide goes by the name of its file without the ending, below the folder. Where one has an .h5 and a .pt (CLAM), the
.h5 is read: it has the coordinates, which become the grid that heads with places need.
"""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .config import digest
from .errors import BrokenBag, UsageError, slide_door
from .fingerprint import fingerprint

if TYPE_CHECKING:
    from heads import Bag

ENDINGS = (".h5", ".npy", ".pt")  # the first that is there is read
LAYOUTS = ("h5_files", "pt_files")  # of CLAM: one slide, two folders
FEATURES, COORDS = ("features", "feats"), ("coords",)
EDGES = ("patch_size_level0", "tile_size_um")  # of a tile, in the unit of the coordinates: of TRIDENT, of STAMP
DIGITS = 3  # of a distance between tiles: µm are not whole


class FeatureFiles:
    """A folder of feature files, as a place whose slides may be labelled."""

    def __init__(self, folder: str | Path) -> None:
        self.root = Path(folder).absolute()
        self._files = _files(self.root)
        self.levels: list[float] = []
        self.dim = 0

    @staticmethod
    def are_in(folder: str | Path) -> bool:
        return bool(_files(Path(folder)))

    def slides(self) -> list[str]:
        return sorted(self._files)

    def origin(self) -> Path:
        return self.root

    def has_features(self, slide: str) -> bool:
        return slide in self._files

    def features(self, slides: Sequence[str], encoder: str | None) -> "FeatureFiles":
        """Itself, once their length is known from the first. Raises UsageError."""
        if encoder is not None:
            raise UsageError(f"--encoder {encoder}: {self.root} holds feature files, which do not say whose they are")
        try:
            self.dim = self.bag(slides[0]).dim
        except BrokenBag as error:
            raise UsageError(str(error)) from error
        return self

    def bag(self, slide: str) -> "Bag":
        """Raises BrokenBag if the file cannot be read, or is of another length than the others."""
        from heads import BadBag, Bag  # torch, which `run` does not need in its process

        path = self._files[slide]
        with slide_door(slide, "train", BrokenBag):
            features, coords, edge = READERS[path.suffix](path)
            if features.ndim == 3 and len(features) == 1:  # a batch of one slide
                features = features[0]
            if features.ndim != 2:
                raise BrokenBag(
                    slide, "train", f"{path} holds features of shape {features.shape}, not (tiles, features)"
                )
            if self.dim and features.shape[1] != self.dim:
                raise BrokenBag(
                    slide, "train", f"{path} has {features.shape[1]} features a tile, the first slide {self.dim}"
                )
            if coords is not None and coords.ndim == 3 and len(coords) == 1:
                coords = coords[0]
            grid = None if coords is None else _grid(coords[:, :2], edge)
        try:
            return Bag.flat(features.astype(np.float32), grid=grid, slide=slide)
        except BadBag as error:
            raise BrokenBag(slide, "train", f"{path}: {error}") from error

    def state(self, slide: str) -> str:
        """Changes with the file."""
        return fingerprint(self._files[slide]).sha256

    def about(self) -> dict[str, Any]:
        """Only their length is known: a model of these takes whatever has as many."""
        facts = {"name": "files", "dim": self.dim}
        return {"encoder_key": "files", "encoder": facts, "feature_hash": digest(facts), "encoded_mpp": []}


def _files(root: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for ending in reversed(ENDINGS):
        for path in sorted(root.rglob(f"*{ending}")):
            inner = path.relative_to(root).with_suffix("")
            parts = [part for part in inner.parts[:-1] if part not in LAYOUTS]
            if parts[:1] != ["models"]:  # ours, written there
                found["/".join([*parts, inner.name])] = path
    return found


def _grid(coords: np.ndarray, step: float | None) -> np.ndarray:
    """(N, 2) positions → (column, row); tiles stand `step` apart, as neighbours mostly do where it is not known."""
    if not len(coords):
        raise ValueError("it has no tile")
    if not np.isfinite(coords).all():
        raise ValueError("it has coordinates that are not finite")
    cells = (coords - coords.min(axis=0)) / (step or _usual_step(coords))
    return np.floor(cells + 0.5).astype(np.int64)  # not rint, which would bend a contour that is half a tile off


def _usual_step(coords: np.ndarray) -> float:
    """The most frequent distance to the next tile of the same row or column.

    Of the same: CLAM's contours start where they like, so that rows of two contours may be a pixel apart.
    """
    steps = []
    for axis in (0, 1):
        lines = np.round(coords[np.lexsort((coords[:, axis], coords[:, 1 - axis]))], DIGITS)
        same = np.diff(lines[:, 1 - axis]) == 0
        steps.append(np.diff(lines[:, axis])[same])
    known, counts = np.unique(np.round(np.concatenate(steps), DIGITS), return_counts=True)
    known, counts = known[known > 0], counts[known > 0]
    return float(known[counts.argmax()]) if len(known) else 1.0


def _read_h5(path: Path) -> tuple[np.ndarray, np.ndarray | None, float | None]:
    try:
        import h5py
    except ImportError as error:
        raise UsageError("reading .h5 needs h5py: pip install 'slidestream[h5]'") from error
    with h5py.File(path) as file:
        name = next((name for name in FEATURES if name in file), None)
        if name is None:
            raise ValueError(f"it has no {' or '.join(FEATURES)}; there are {', '.join(file) or 'none'}")
        coords = next((file[name] for name in COORDS if name in file), None)
        attrs = dict(file.attrs) | ({} if coords is None else dict(coords.attrs))
        return file[name][()], None if coords is None else coords[()], _step(attrs)


def _step(attrs: dict[str, Any]) -> float | None:
    """From a tile to the next, in the unit of the coordinates, where that is said."""
    edge = next((float(attrs[name]) for name in EDGES if name in attrs), None)
    if edge is None:  # CLAM's patch_size is in pixels of the patch's level, and its step may be another
        return None
    overlap = float(attrs.get("overlap", 0)) / float(attrs["patch_size"]) if "patch_size" in attrs else 0.0
    return edge * (1 - overlap) if overlap < 1 else None


def _read_pt(path: Path) -> tuple[np.ndarray, np.ndarray | None, float | None]:
    import torch

    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError("it is damaged, or holds more than tensors and was not run") from error
    held = held if isinstance(held, dict) else {FEATURES[0]: held}
    name = next((name for name in FEATURES if name in held), None)
    if name is None:
        raise ValueError(f"it has no {' or '.join(FEATURES)}; there are {', '.join(map(str, held)) or 'none'}")
    coords = next((held[name] for name in COORDS if name in held), None)
    features = torch.as_tensor(held[name]).detach().float().numpy()  # numpy has no bfloat16
    return features, None if coords is None else np.asarray(coords), None


def _read_npy(path: Path) -> tuple[np.ndarray, np.ndarray | None, float | None]:
    return np.load(path, allow_pickle=False), None, None


READERS = {".h5": _read_h5, ".pt": _read_pt, ".npy": _read_npy}

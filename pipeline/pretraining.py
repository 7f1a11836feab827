"""Slides without labels → an encoder's weights: self-supervised pre-training on the tiles of an output folder.

The loop stands in extractors.dino. Under torchrun each process reads a share of every epoch's tiles; the first writes.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from extractors import EncoderError, load_encoder
from extractors.dino import (
    RECIPES,
    Course,
    Pretraining,
    Recipe,
    network,
    read_checkpoint,
    save_checkpoint,
    save_weights,
)
from extractors.neighbours import accuracy
from extractors.weights import sha256
from heads.scorenet import PLACE

from . import unbiased
from .cohort import Cohort, read_cohort
from .config import difference
from .curves import save_pretraining
from .errors import BrokenBag, RunStopped, UsageError
from .judging import Judged
from .lock import locked
from .output import read_run, write_json
from .pool import Pool, read_pool
from .stages import versions
from .store import BagStore
from .training import checked_name

WATCHED_TILES = 1024  # of labelled slides, kept in memory, by which the teacher's neighbours are watched
AT_ONCE = 64  # of them through the network


@dataclass(frozen=True)
class Pretrained:
    """A finished pre-training: the weights that `run --weights` takes, how it went, and what the user should know."""

    weights: Path
    course: Course
    epoch: int  # whose teacher the weights are, from 1
    tiles_per_s: float | None  # None where nothing was left to do
    warnings: tuple[str, ...]


def pretrain(
    out: str | Path,
    *,
    arch: str = "vit_small_dino",
    pretext: str = "dino",
    name: str | None = None,
    labels: str | Path | None = None,
    fold: int | None = None,
    cv: int | None = None,
    splits: str | Path | None = None,
    task: str = "classification",
    target: str = "label",
    group: str = "patient",
    site: str | None = None,
    level: float | None = None,
    tiles_per_epoch: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    patience: int | None = None,
    seed: int = 0,
    device: str | None = None,
    on_epoch: Callable[[Course], None] = lambda course: None,
) -> Pretrained:
    """Train an encoder without labels on the tiles of OUT; writes OUT/pretrained/<name>. The same call again resumes.

    Tiles are read from the slides anew in each epoch, at `level` (µm/px, the finest unless told): `tiles_per_epoch` of
    them, all unless told. `epochs`, `batch_size` and `lr` replace fields of the recipe of `arch` (extractors.dino).
    `pretext="unbiased"` is ScoreNet's own (unbiased.py), for `arch="scorenet"` and tiles of a multiple of 128 px, which
    are whole pictures to it.

    With `labels` only training slides are used: those of fold number `fold` of `cv` or `splits`, by the seed and the
    columns that `train` takes; without these those that the table's column `split` calls train, or all labelled ones.
    Classes are then watched by nearest neighbours of other patients, and with `patience` training ends after so many
    epochs without a better accuracy, and the weights are those of the best. Raises UsageError.
    """
    place, recipe = Path(out), _recipe(arch, pretext, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed)
    asked = {"task": task, "target": target, "group": group, "site": site}
    cohort, rows = _training_slides(place, labels, fold, Judged(cv, splits, seed=seed), asked)
    watched = cohort is not None and _has_classes(cohort, rows)
    if patience is not None and not watched:
        raise UsageError("--patience: there is nothing to watch without --labels of two classes, each of two patients")
    slides = _complete(place) if cohort is None else [s for row in rows for s in cohort.slides[row]]
    try:
        pool, mpp = read_pool(place, slides, level)
    except BrokenBag as error:
        raise UsageError(str(error)) from error
    _refuse_misfit(arch, pool.tile_px)
    count = len(pool) if tiles_per_epoch is None else min(tiles_per_epoch, len(pool))
    folder = place / "pretrained" / checked_name(name or arch)
    with _together(device) as (rank, world, chosen):
        if arch == unbiased.ARCH and world > 1:
            raise UsageError("--pretext unbiased works in one process: parts of ScoreNet have no gradient to share")
        if recipe.batch_size % world:
            raise UsageError(f"--batch-size {recipe.batch_size} cannot be shared by {world} processes")
        if count < recipe.batch_size:
            raise UsageError(f"an epoch of {count} tiles is less than a batch of {recipe.batch_size}: --batch-size")
        count -= count % recipe.batch_size
        about = {
            "schema": "slidestream/pretrained",
            "arch": arch,
            "pretext": pretext,
            "recipe": recipe.as_dict(),
            "root": read_run(place)["root"],
            "slides": {part.name: part.fingerprint for part in pool.parts},
            "tiles": {part.name: part.tree.hash for part in pool.parts},
            "mpp": mpp,
            "tile_px": pool.tile_px,
            "tiles_per_epoch": count,
            "patience": patience,
            "processes": world,
        }
        try:
            training = _training(arch, recipe, pool.tile_px, count // recipe.batch_size, chosen)
        except EncoderError as error:  # no lightly, no such device
            raise UsageError(str(error)) from error
        watch = _watch(pool, cohort, recipe.seed) if cohort is not None and watched and rank == 0 else None
        work = _Work(folder, about, training, pool, watch, rank, world)
        with _locked(folder, rank):
            return work.run(on_epoch)


def _recipe(arch: str, pretext: str, **changes: Any) -> Recipe:
    known = {"dino": RECIPES, "unbiased": {unbiased.ARCH: unbiased.RECIPE}}
    if pretext not in known or arch not in known[pretext]:
        fits = "; ".join(f"--pretext {name}: --arch {' or '.join(archs)}" for name, archs in known.items())
        raise UsageError(f"--arch {arch} --pretext {pretext}: known are {fits}")
    return replace(known[pretext][arch], **{name: value for name, value in changes.items() if value is not None})


def _refuse_misfit(arch: str, tile_px: int) -> None:
    if arch == unbiased.ARCH:
        fits, wanted = tile_px % PLACE == 0 and tile_px > PLACE, f"a multiple of {PLACE} px, such as {8 * PLACE}"
    else:
        fits, wanted = tile_px >= load_encoder(arch).facts.tile_px, f"{load_encoder(arch).facts.tile_px} px"
    if not fits:
        raise UsageError(
            f"{arch} takes tiles of {wanted}, these have {tile_px} px, and nothing is enlarged: choose tiles anew in "
            "another folder (`slidestream run … --tile-px …`)"
        )


def _training(arch: str, recipe: Recipe, tile_px: int, steps: int, device: str) -> Pretraining:
    if arch != unbiased.ARCH:
        return Pretraining(network(arch, recipe), load_encoder(arch).facts, recipe, steps, device)
    other = partial(unbiased.teacher, tile_px)
    return Pretraining(unbiased.student, unbiased.facts(tile_px), recipe, steps, device, other)


def _complete(out: Path) -> list[str]:
    store = BagStore(out)
    return [name for name in store.slides() if store.group(name).status == "complete"]


def _training_slides(
    out: Path, labels: str | Path | None, fold: int | None, how: Judged, asked: dict[str, Any]
) -> tuple[Cohort | None, np.ndarray]:
    """The labelled units, and which of them are trained on; None without labels."""
    judged = how.cv is not None or how.splits is not None
    if labels is None:
        if judged or fold is not None:
            raise UsageError("--fold, --cv and --splits need --labels: they say which slides are tested")
        return None, np.empty(0, int)
    if judged != (fold is not None):
        raise UsageError("--fold says which fold of --cv or --splits is meant: give both, or neither")
    cohort = read_cohort(out, labels, encoder=_any_encoder(out), **asked)
    if fold is None:
        return cohort, np.arange(len(cohort)) if cohort.splits is None else how.whole(cohort).train
    folds, _ = how.folds(cohort)
    if not 0 <= fold < len(folds):
        raise UsageError(f"--fold {fold}: they are numbered from 0 to {len(folds) - 1}")
    return cohort, folds[fold][1].train


def _any_encoder(out: Path) -> str | None:
    """A cohort is of slides with features; whose features is all the same here."""
    store = BagStore(out)
    keys = [set(store.group(name).encoders()) for name in _complete(out)]
    return min(set.intersection(*keys), default=None) if keys else None


@contextmanager
def _together(device: str | None) -> Iterator[tuple[int, int, str]]:
    """(rank, number of processes, device), joined where torchrun started several."""
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    chosen = device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu")
    if world == 1:
        yield 0, 1, chosen
        return
    if chosen.startswith("cuda"):
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.startswith("cuda") else "gloo")
    try:
        yield dist.get_rank(), world, chosen
    finally:
        dist.destroy_process_group()


@contextmanager
def _locked(folder: Path, rank: int) -> Iterator[None]:
    """The first process holds the folder."""
    if rank:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        for part in folder.glob("*.partial"):  # of a writer that was killed
            part.unlink()
        yield


@dataclass(frozen=True)
class _Watch:
    """Labelled tiles that the teacher's neighbours are asked about; tiles of one owner do not help each other."""

    tiles: torch.Tensor
    labels: torch.Tensor
    owners: torch.Tensor

    def accuracy(self, training: Pretraining) -> float:
        features = torch.cat([training.embed(tiles) for tiles in self.tiles.split(AT_ONCE)])
        return accuracy(features, self.labels, self.owners)


def _has_classes(cohort: Cohort, rows: np.ndarray) -> bool:
    """True if there are two classes at least, and each has slides of two patients."""
    if cohort.targets.kind != "classification":
        return False
    truth, whose = cohort.targets.truth[rows], cohort.whose[rows]
    return len(set(truth)) > 1 and all(len(set(whose[truth == label])) > 1 for label in set(truth))


def _watch(pool: Pool, cohort: Cohort, seed: int) -> _Watch:
    tiles, parts = pool.sample(WATCHED_TILES, (seed, 0))
    index = cohort.index()
    units = np.array([index[part.name] for part in pool.parts])[parts]
    labels, owners = (torch.from_numpy(column[units]).long() for column in (cohort.targets.truth, cohort.whose))
    return _Watch(torch.from_numpy(tiles), labels, owners)


class _Work:
    """A pre-training on its way in its folder."""

    def __init__(
        self,
        folder: Path,
        about: dict[str, Any],
        training: Pretraining,
        pool: Pool,
        watch: _Watch | None,
        rank: int,
        world: int,
    ) -> None:
        self.folder, self.about, self.training, self.pool, self.watch = folder, about, training, pool, watch
        self.rank, self.world = rank, world
        self.best: dict[str, torch.Tensor] | None = None  # the weights of the best epoch, where one is chosen

    def run(self, on_epoch: Callable[[Course], None]) -> Pretrained:
        if about := self._resume():
            raise UsageError(
                f"{self.folder} holds another pre-training:\n  " + "\n  ".join(about) + "\ngive this one a --name"
            )
        before, started = self.training.epochs_done, perf_counter()
        try:
            while not self._over():
                self.training.epoch(self._batches())
                self._look()
                self._save()
                on_epoch(self.training.course)
        except EncoderError as error:
            raise RunStopped(str(error)) from error
        course, seconds = self.training.course, perf_counter() - started
        done = (self.training.epochs_done - before) * self.about["tiles_per_epoch"]
        return Pretrained(
            self.folder / "weights.safetensors",
            course,
            self._kept() + 1,
            done / seconds if done else None,
            tuple(self.pool.lost.values()),
        )

    def _resume(self) -> list[str]:
        """Go on from the checkpoint, if there is one; how it differs, where it is of another training."""
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            return []
        try:
            content = read_checkpoint(path)
        except EncoderError as error:
            raise UsageError(f"{error}, or remove it to begin anew") from error
        old, new = content["about"], self.about
        if old != new:
            flat = [one | one["recipe"] | {"recipe": None} for one in (old, new)]
            words = [f"{key}: other ones" for key in ("slides", "tiles") if old[key] != new[key]]
            return words + [line for line in difference(*flat) if not line.startswith(("slides:", "tiles:"))]
        self.training.restore(content)
        self.best = content["best"]
        return []

    def _over(self) -> bool:
        patience = self.about["patience"]
        if self.training.epochs_done >= self.training.recipe.epochs:
            return True
        return patience is not None and self.training.epochs_done - 1 - self._kept() >= patience

    def _kept(self) -> int:
        """The epoch whose teacher is kept: the last, or with patience the first of the best."""
        watched = self.training.course.watched
        if self.about["patience"] is None or not watched:
            return self.training.epochs_done - 1
        return int(np.argmax(watched))

    def _batches(self) -> Iterator[torch.Tensor]:
        own = self.training.recipe.batch_size // self.world
        seed = (self.training.recipe.seed, self.training.epochs_done)
        tiles = self.pool.draw(self.about["tiles_per_epoch"], seed, self.rank, self.world)
        for _ in range(self.training.steps):
            yield torch.from_numpy(np.stack([next(tiles) for _ in range(own)]))

    def _look(self) -> None:
        """What the neighbours say, to all processes; NaN where nobody watches."""
        value = torch.tensor(self.watch.accuracy(self.training) if self.watch else np.nan, dtype=torch.float64)
        if self.world > 1:
            value = value.to(self.training.device)
            dist.broadcast(value, 0)
        if not bool(value.isnan()):
            self.training.course.watched.append(float(value))
        if self.about["patience"] is not None and self._kept() == self.training.epochs_done - 1:
            self.best = self.training.backbone()

    def _save(self) -> None:
        """The checkpoint last: what is missing before it is made again from the one before."""
        if self.rank:
            return
        course, kept = self.training.course, self._kept()
        weights = self.folder / "weights.safetensors"
        told = self.about | {"epoch": kept + 1}
        save_weights(weights, self.training.backbone() if self.best is None else self.best, told)
        history = {"losses": course.losses, "watched": course.watched, "lost": self.pool.lost}
        write_json(
            self.folder / "pretrained.json", told | history | {"sha256": sha256(weights), "versions": versions()}
        )
        save_pretraining(self.folder / "curves.png", course.losses, course.watched, kept)
        save_checkpoint(self.folder / "checkpoint.pt", self.training.state() | {"about": self.about, "best": self.best})

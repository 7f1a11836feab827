"""Training on bags: one plain loop, to be read from top to bottom and copied where it does not fit.

    train, validation = split(targets, groups=patients)
    held_out = [bags[i] for i in validation], targets[validation]
    history = fit(head, [bags[i] for i in train], targets[train], validation=held_out)
    probabilities = predict(head, others)

`bags` is any sequence; `bags[i]` may read from a disk, since one bag is held at a time.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .bag import Bag
from .head import Head
from .mixing import MIXES
from .recipe import Lookahead, Recipe, mean_of
from .tasks import Classification, Task

Labels = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class History:
    train_loss: tuple[float, ...]  # one per epoch
    validation_loss: tuple[float, ...]  # one per epoch, of the bags' logits alone; empty without validation
    best_epoch: int  # counted from 0: of the weights that were kept (of their mean: the best, otherwise the last)


def fit(
    head: Head,
    bags: Sequence[Bag],
    targets: Any,
    *,
    task: Task | None = None,
    recipe: Recipe = Recipe(),
    validation: tuple[Sequence[Bag], Any] | None = None,
    seed: int = 0,
    on_epoch: Callable[[int, float, float | None], None] | None = None,
    **changes: Any,
) -> History:
    """Train by the recipe, one bag at a time; ends in eval mode.

    task: what is asked, by default one class of each bag; targets: what its loss takes, one for each bag. changes:
    fields of the recipe (`epochs=20`). With validation the weights of the epoch with the lowest validation loss are
    kept, and training ends after `patience` epochs without a lower one; without, all epochs are run and the last
    weights kept. The validation loss is the task's, of what the head says of the bag: what it adds to that while it
    trains (a loss on tiles, those of coarser levels) does not choose the epoch.
    `on_epoch(epoch, train_loss, validation_loss)` is for a progress bar.
    """
    recipe = replace(recipe, **changes)
    task, targets = _asked(head, task, targets, len(bags), recipe)
    held_out = None if validation is None else (validation[0], _checked(task, validation[1], len(validation[0])))
    device = next(head.parameters()).device
    optimizer = recipe.make_optimizer(head.parameters())
    schedule, slow = recipe.make_schedule(optimizer), Lookahead(head, recipe.lookahead)
    shuffle = torch.Generator().manual_seed(seed)
    train_loss: list[float] = []
    validation_loss: list[float] = []
    kept = _Kept(recipe)

    loss_of = _step(head, bags, targets, task, recipe)
    with dropout_seed(seed, device):
        for epoch in range(recipe.epochs):
            batches = torch.randperm(len(bags), generator=shuffle).split(recipe.accumulation)
            train_loss.append(train_epoch(head, loss_of, batches, optimizer, recipe.clip, slow))
            schedule.step()
            if held_out is not None:
                validation_loss.append(mean_loss(head, *held_out, task))
            if on_epoch is not None:
                on_epoch(epoch, train_loss[-1], validation_loss[-1] if validation_loss else None)
            kept.offer(epoch, head, validation_loss[-1] if validation_loss else None)
            if validation_loss and epoch + 1 >= recipe.min_epochs and kept.stale(epoch):
                break

    head.load_state_dict(kept.weights())
    head.eval()
    return History(tuple(train_loss), tuple(validation_loss), kept.best)


class _Kept:
    """The weights of the epochs that may be wanted at the end."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._lowest, self._lowest_epoch = math.inf, 0  # of all epochs: for patience
        self._states: list[tuple[float, int, dict[str, Tensor]]] = []  # the best first

    def offer(self, epoch: int, head: Head, loss: float | None) -> None:
        if loss is not None and loss < self._lowest:
            self._lowest, self._lowest_epoch = loss, epoch
        if epoch < self._recipe.keep_from:
            return
        by_loss = loss is not None and self._recipe.keep != "last"
        rank = loss if loss is not None and by_loss else -float(epoch)
        most = 5 if self._recipe.keep == "average5" else 1
        if len(self._states) < most or rank < self._states[-1][0]:
            self._states = sorted([*self._states, (rank, epoch, snapshot(head))], key=lambda state: state[:2])[:most]

    def stale(self, epoch: int) -> bool:
        return epoch - self._lowest_epoch >= self._recipe.patience and bool(self._states)

    @property
    def best(self) -> int:
        return self._states[0][1]

    def weights(self) -> dict[str, Tensor]:
        return mean_of([state for _, _, state in self._states])


def _asked(head: Head, task: Task | None, targets: Any, count: int, recipe: Recipe) -> tuple[Task, Any]:
    """The task, and its targets, checked. Classes get weights if the recipe says so."""
    task = task or Classification(head.classes)
    if task.outputs != head.classes:
        raise ValueError(f"the head has {head.classes} outputs, {type(task).__name__} needs {task.outputs}")
    targets = _checked(task, targets, count)
    if isinstance(task, Classification):
        if len(targets.unique()) < 2:
            raise ValueError(f"all {count} training labels are {targets[0]}: one class alone cannot be learned")
        if recipe.class_weights and task.weights is None:
            task = replace(task, weights=tuple(inverse_frequency(targets, head.classes).tolist()))
    return task, targets


def _checked(task: Task, targets: Any, count: int) -> Any:
    if isinstance(task, Classification):
        return check_labels(targets, count, task.classes)
    if len(targets) != count or count == 0:
        raise ValueError(f"{count} bags, but {len(targets)} targets: one for each bag, and at least one bag")
    return targets


@dataclass(frozen=True)
class Augmented(Sequence[Any]):
    """Pictures, each time they are asked for as the head would have them for training."""

    head: Head
    pictures: Sequence[Any]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: Any) -> Any:
        return self.head.augment(self.pictures[index])


def _step(head: Head, bags: Sequence[Any], targets: Any, task: Task, recipe: Recipe) -> Callable[[int], Tensor]:
    """Row → the loss of a training step on it."""
    if (recipe.augment or recipe.mix != "none") and not head.needs.pixels:
        raise ValueError(f"{type(head).__name__} reads features: augment and mix are for heads of pixels")
    seen = Augmented(head, bags) if recipe.augment else bags
    if recipe.mix == "none":
        return lambda i: bag_loss(head, seen, targets, i, task)
    mixing = MIXES[recipe.mix]()
    return lambda i: finite(mixing.loss(head, seen, targets, i, task), i, bags[i])


def train_epoch(
    head: Head,
    loss_of: Callable[[int], Tensor],
    batches: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    clip: float | None,
    slow: Lookahead,
) -> float:
    """The mean loss over the bags, each taken before the step it led to."""
    head.train()
    total, count = 0.0, 0
    for batch in batches:
        optimizer.zero_grad()
        for i in batch.tolist():
            loss = loss_of(i)
            (loss / len(batch)).backward()
            total += loss.item()
            count += 1
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(head.parameters(), clip)
        optimizer.step()
        slow.step()
    return total / count


@torch.no_grad()
def mean_loss(head: Head, bags: Sequence[Bag], targets: Any, task: Task) -> float:
    head.eval()
    device = next(head.parameters()).device
    total = 0.0
    for i in range(len(bags)):
        bag = bags[i].to(device)
        total += finite(task.loss(head(bag).logits, targets[i]), i, bag).item()
    return total / len(bags)


def bag_loss(head: Head, bags: Sequence[Bag], targets: Any, i: int, task: Task) -> Tensor:
    bag = bags[i].to(next(head.parameters()).device)
    return finite(head.loss(head(bag), targets[i], task), i, bag)


def finite(loss: Tensor, i: int, bag: Bag) -> Tensor:
    """Refused before the backward step, which would spread it to every weight."""
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"the loss is {loss.item()} at bag {i} ({bag.slide!r}); a lower lr may help")
    return loss


@torch.no_grad()
def logits_of(head: Head, bags: Sequence[Bag]) -> np.ndarray:
    """(n, outputs), float64. Leaves the head in eval mode."""
    head.eval()
    device = next(head.parameters()).device
    rows = [head(bags[i].to(device)).logits.double().cpu().numpy() for i in range(len(bags))]
    return np.stack(rows) if rows else np.empty((0, head.classes))


def predict(head: Head, bags: Sequence[Bag], task: Task | None = None) -> np.ndarray:
    """What the task says of each bag, by default (n, C) probabilities. Leaves the head in eval mode."""
    outputs: np.ndarray = (task or head.task).predict(torch.from_numpy(logits_of(head, bags))).numpy()
    return outputs


def split(
    targets: Labels, groups: Sequence[object] | np.ndarray | None = None, fraction: float = 0.2, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Rows for training and for validation: about `fraction` of the bags held out, stratified, no group on both sides.

    Both sides hold every class. Where the asked fraction does not allow it (few bags of a rare class), a larger share
    is held out; where nothing does, it is a ValueError.
    """
    y = np.asarray(targets)
    owners = np.arange(len(y)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if len(owners) != len(y):
        raise ValueError(f"{len(y)} targets, but {len(owners)} groups")
    if not 0 < fraction <= 0.5:
        raise ValueError(f"fraction must be above 0 and at most 0.5, not {fraction}")
    for label in np.unique(y):
        if len(np.unique(owners[y == label])) < 2:
            what = "bag" if groups is None else "group"
            raise ValueError(f"class {label} is in one {what} only: it cannot be both trained on and held out")
    for train, held_out in _folds(y, None if groups is None else owners, round(1 / fraction), seed):
        if set(y[train]) == set(y[held_out]):  # and so both hold every class
            return train, held_out
    raise ValueError("found no split with every class on both sides: the classes share too few groups")


def _folds(y: np.ndarray, owners: np.ndarray | None, most: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All folds of a cross-validation of `most` folds, then of fewer and larger ones, down to two halves."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold  # a second to import: only when needed

    kind = StratifiedKFold if owners is None else StratifiedGroupKFold
    groups = len(y) if owners is None else len(np.unique(owners))
    # more folds than groups, or than bags in the largest class, are refused by scikit-learn
    counts = range(min(most, groups, np.unique(y, return_counts=True)[1].max()), 1, -1)
    for k, shuffle in product(counts, range(5)):  # another shuffle sometimes parts what the first one could not
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a class with fewer bags than folds: `split` looks itself
            folds = list(kind(k, shuffle=True, random_state=seed + shuffle).split(np.zeros(len(y)), y, owners))
        yield from folds


def check_labels(targets: Labels, count: int, classes: int) -> Tensor:
    labels = np.asarray(targets)
    if labels.shape != (count,) or count == 0:
        raise ValueError(
            f"{count} bags, but targets of shape {labels.shape}: one label for each bag, and at least one bag"
        )
    if labels.dtype.kind not in "iub" or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"targets must be whole numbers in 0..{classes - 1}: the head has {classes} classes")
    return torch.from_numpy(labels.astype(np.int64))


def inverse_frequency(labels: Tensor, classes: int) -> Tensor:
    """(C,) weights, mean 1 over the classes that occur; a class that does not occur has weight 1."""
    counts = torch.bincount(labels, minlength=classes)
    weight = 1 / counts.clamp(min=1)
    return torch.where(counts > 0, weight / weight[counts > 0].mean(), 1.0)


def snapshot(head: Head) -> dict[str, Tensor]:
    return {name: values.clone() for name, values in head.state_dict().items()}


@contextmanager
def dropout_seed(seed: int, device: torch.device) -> Iterator[None]:
    """Dropout draws from torch's global generator: seed it for us, and give it back to the caller as it was."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # not torch.manual_seed, which would also reseed every device that was not put aside here
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index].manual_seed(seed)
        yield

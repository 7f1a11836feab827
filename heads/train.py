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
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from .bag import Bag
from .head import Head

Labels = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class History:
    train_loss: tuple[float, ...]  # one per epoch
    validation_loss: tuple[float, ...]  # one per epoch; empty without validation
    best_epoch: int  # counted from 0; the head has the weights of this one


def fit(
    head: Head,
    bags: Sequence[Bag],
    targets: Labels,
    *,
    validation: tuple[Sequence[Bag], Labels] | None = None,
    epochs: int = 50,
    lr: float = 1e-4,
    weight_decay: float = 1e-5,
    patience: int = 10,
    class_weights: bool = True,
    seed: int = 0,
    accumulation: int = 1,
    on_epoch: Callable[[int, float, float | None], None] | None = None,
) -> History:
    """Train with Adam, one bag at a time, a step after every `accumulation` bags; ends in eval mode.

    With validation the weights of the epoch with the lowest validation loss are kept, and training ends after
    `patience` epochs without a lower one; without, all epochs are run and the last weights kept.
    `on_epoch(epoch, train_loss, validation_loss)` is for a progress bar.
    """
    if min(epochs, patience, accumulation) < 1:
        raise ValueError(f"epochs, patience and accumulation must be at least 1: {epochs}, {patience}, {accumulation}")
    labels = check_labels(targets, len(bags), head.classes)
    if len(labels.unique()) < 2:
        raise ValueError(f"all {len(labels)} training labels are {labels[0]}: one class alone cannot be learned")
    held_out = (
        None if validation is None else (validation[0], check_labels(validation[1], len(validation[0]), head.classes))
    )
    device = next(head.parameters()).device
    weight = inverse_frequency(labels, head.classes).to(device) if class_weights else None
    optimizer = torch.optim.Adam(head.parameters(), lr=lr, weight_decay=weight_decay)
    shuffle = torch.Generator().manual_seed(seed)
    train_loss: list[float] = []
    validation_loss: list[float] = []
    best, best_weights = 0, {}

    with dropout_seed(seed, device):
        for epoch in range(epochs):
            batches = torch.randperm(len(labels), generator=shuffle).split(accumulation)
            train_loss.append(train_epoch(head, bags, labels, batches, optimizer, weight))
            if held_out is not None:
                validation_loss.append(mean_loss(head, *held_out, weight))
            if on_epoch is not None:
                on_epoch(epoch, train_loss[-1], validation_loss[-1] if validation_loss else None)
            if held_out is None or epoch == 0 or validation_loss[-1] < validation_loss[best]:
                best, best_weights = epoch, snapshot(head)
            elif epoch - best >= patience:
                break

    head.load_state_dict(best_weights)
    head.eval()
    return History(tuple(train_loss), tuple(validation_loss), best)


def train_epoch(
    head: Head,
    bags: Sequence[Bag],
    labels: Tensor,
    batches: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    weight: Tensor | None,
) -> float:
    """The mean loss over the bags, each taken before the step it led to."""
    head.train()
    total = 0.0
    for batch in batches:
        optimizer.zero_grad()
        for i in batch.tolist():
            loss = bag_loss(head, bags, labels, i, weight)
            (loss / len(batch)).backward()
            total += loss.item()
        optimizer.step()
    return total / len(labels)


@torch.no_grad()
def mean_loss(head: Head, bags: Sequence[Bag], labels: Tensor, weight: Tensor | None) -> float:
    head.eval()
    return sum(bag_loss(head, bags, labels, i, weight).item() for i in range(len(labels))) / len(labels)


def bag_loss(head: Head, bags: Sequence[Bag], labels: Tensor, i: int, weight: Tensor | None) -> Tensor:
    bag = bags[i].to(next(head.parameters()).device)
    loss = head.loss(head(bag), int(labels[i]), weight)
    if not math.isfinite(loss.item()):
        # said before the backward step, which would spread it to every weight
        raise FloatingPointError(f"the loss is {loss.item()} at bag {i} ({bag.slide!r}); a lower lr may help")
    return loss


@torch.no_grad()
def predict(head: Head, bags: Sequence[Bag]) -> np.ndarray:
    """(n, C) probabilities, float64. Leaves the head in eval mode."""
    head.eval()
    device = next(head.parameters()).device
    rows = [head(bags[i].to(device)).logits.double().softmax(-1).cpu().numpy() for i in range(len(bags))]
    return np.stack(rows) if rows else np.empty((0, head.classes))


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

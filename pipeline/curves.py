"""The losses of a training over its epochs, as a picture."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .places import put

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINT = "."  # one epoch makes no line


def save_curves(path: Path, train: Sequence[float], validation: Sequence[float], kept: int) -> None:
    """`kept`: the epoch whose weights the model has."""
    axes = _axes(kept)
    epochs = range(1, len(train) + 1)
    axes.plot(epochs, train, label="training", marker=POINT)
    if validation:
        axes.plot(epochs, validation, label="validation", marker=POINT)
    axes.set(ylabel="mean loss of a slide")
    axes.legend(frameon=False)
    _save(axes, path)


def save_pretraining(path: Path, losses: Sequence[float], watched: Sequence[float], kept: int) -> None:
    """The loss, and the accuracy of nearest neighbours where it was watched. `kept`: the epoch of the weights."""
    axes = _axes(kept)
    epochs = range(1, len(losses) + 1)
    lines = [*axes.lines, *axes.plot(epochs, losses, label="loss", marker=POINT)]
    if watched:
        other = axes.twinx()
        lines += other.plot(epochs, watched, color="C1", label="nearest neighbours", marker=POINT)
        other.set(ylabel="balanced accuracy of tiles", ylim=(0, 1))
    axes.set(ylabel="loss")
    axes.legend(handles=lines, frameon=False)
    _save(axes, path)


def _axes(kept: int) -> "Axes":
    """Epochs from left to right, with a line at the one that is kept."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.axvline(kept + 1, color="grey", linewidth=0.8, linestyle="--", label=f"kept: epoch {kept + 1}")
    axes.set(xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return axes


def _save(axes: "Axes", path: Path) -> None:
    picture = io.BytesIO()
    axes.get_figure(root=True).savefig(picture, dpi=120, metadata={"Software": None})  # type: ignore[union-attr]
    put(path, picture.getvalue())

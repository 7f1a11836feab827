"""The losses of a training over its epochs, as a picture."""

from collections.abc import Sequence
from pathlib import Path


def save_curves(path: Path, train: Sequence[float], validation: Sequence[float], kept: int) -> None:
    """`kept`: the epoch whose weights the model has."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    epochs = range(1, len(train) + 1)
    axes.plot(epochs, train, label="training")
    if validation:
        axes.plot(epochs, validation, label="validation")
    axes.axvline(kept + 1, color="grey", linewidth=0.8, linestyle="--", label=f"kept: epoch {kept + 1}")
    axes.set(xlabel="epoch", ylabel="mean loss of a slide")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def save_pretraining(path: Path, losses: Sequence[float], watched: Sequence[float], kept: int) -> None:
    """The loss, and the accuracy of nearest neighbours where it was watched. `kept`: the epoch of the weights."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    epochs = range(1, len(losses) + 1)
    lines = axes.plot(epochs, losses, label="loss")
    if watched:
        other = axes.twinx()
        lines += other.plot(epochs, watched, color="C1", label="nearest neighbours")
        other.set(ylabel="balanced accuracy of tiles", ylim=(0, 1))
    lines.append(axes.axvline(kept + 1, color="grey", linewidth=0.8, linestyle="--", label=f"kept: epoch {kept + 1}"))
    axes.set(xlabel="epoch", ylabel="loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(handles=lines, frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})

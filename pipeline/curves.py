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

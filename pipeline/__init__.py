"""slidestream: a folder of whole slides in; tissue masks, quadtrees of tiles, features and predictions out.

    from pipeline import open_slide, find_tissue, build_quadtree, BagStore, run, train, compare, predict

Names are loaded when they are first used (PEP 562), so that importing this costs nothing.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "BagStore": "store",
    "Config": "config",
    "QuadTree": "quadtree",
    "build_quadtree": "quadtree",
    "compare": "comparison",
    "evaluate": "localisation",
    "evaluate_labels": "external",
    "find_tissue": "tissue",
    "open_slide": "readers",
    "predict": "batch",
    "pretrain": "pretraining",
    "probe": "probing",
    "run": "batch",
    "stitch": "mapping",
    "train": "training",
    "verify": "verification",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})

"""Heads: from the features of a slide's tiles to a prediction for the slide, with the share of every tile in it.

    head = load_head("abmil", dim=1024, classes=2, gated=True)
    out = head(Bag.flat(features))
    out.probabilities, out.tiles[0].weight

The file name is the registry: `heads/foo.py` that defines `build(dim, classes, **options)` is the head "foo", and
"package.module:function" is a build function from outside. Needs nothing but torch; training is in `heads.train`.
"""

import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from .bag import BadBag, Bag, BagLevel, Prediction, TileScores
from .head import Head, Needs

__all__ = [
    "BadBag",
    "Bag",
    "BagLevel",
    "Head",
    "Needs",
    "Prediction",
    "TileScores",
    "UnknownName",
    "UnknownOption",
    "list_heads",
    "load_head",
    "reads_pixels",
]


class UnknownName(ValueError):
    """No head of this name."""


class UnknownOption(ValueError):
    """The head has no option of this name."""


def load_head(name: str, dim: int | None = None, classes: int = 2, preset: str | None = None, **options: Any) -> Head:
    """A new head with random weights (torch's generator draws them: seed it first to get the same ones again).

    dim: features of a tile; a head of pixels needs none. preset: options that go by a name, "paper" where ours differ
    from the print; other options stand above them.
    """
    build = _outside(name) if ":" in name else _inside(name)
    _refuse_unknown_options(name, build, options)
    options = _preset(name, build, preset) | options
    if dim is None and inspect.signature(build).parameters["dim"].default is inspect.Parameter.empty:
        raise UnknownOption(f"{name} reads features: say how many a tile has, dim=")
    head = build(**({} if dim is None else {"dim": dim}), classes=classes, **options)
    if not isinstance(head, Head):
        raise TypeError(f"{name} built a {type(head).__name__}, not a heads.Head")
    return head


def reads_pixels(name: str, **options: Any) -> bool:
    """Whether the head, with these options, reads pictures and no features."""
    build = _outside(name) if ":" in name else _inside(name)
    asked = getattr(build, "reads_pixels", None)
    return asked is not None and bool(asked(options))


def list_heads() -> list[str]:
    return [name for name in _modules() if hasattr(import_module(f".{name}", __name__), "build")]


def _modules() -> list[str]:
    return sorted(module.name for module in iter_modules(__path__))


def _inside(name: str) -> Callable[..., Any]:
    # asked of the folder first: a name from a file or a command line must not decide what gets imported
    module = import_module(f".{name}", __name__) if name in _modules() else None
    if not hasattr(module, "build"):
        raise UnknownName(f"no head is called {name!r}{_hint(name, list_heads())}")
    return module.build  # type: ignore[union-attr]


def _outside(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), function]):
        raise UnknownName(f"{name!r} is not of the form package.module:function")
    try:
        build = getattr(import_module(module), function)
    except (ModuleNotFoundError, AttributeError) as error:
        raise UnknownName(f"cannot load {name!r}: {error}") from error
    if not callable(build):
        raise UnknownName(f"{name!r} is a {type(build).__name__}, not a function that builds a head")
    return build


def _preset(name: str, build: Callable[..., Any], preset: str | None) -> dict[str, Any]:
    known: dict[str, dict[str, Any]] = getattr(build, "presets", {})
    if preset is None:
        return {}
    if preset not in known:
        raise UnknownOption(f"{name} has no preset {preset!r}{_hint(preset, known)}")
    return known[preset]


def _refuse_unknown_options(name: str, build: Callable[..., Any], options: dict[str, Any]) -> None:
    parameters = inspect.signature(build).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = [option for option in parameters if option not in ("dim", "classes")]
    for option in options:
        if option not in known:
            raise UnknownOption(f"{name} has no option {option!r}{_hint(option, known)}")


def _hint(word: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = get_close_matches(word, known, n=1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    return f"{meant} (known: {', '.join(known) or 'none'})"

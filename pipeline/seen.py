"""Which slides an encoder was pre-trained on. Its weights file says so itself, in its metadata."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .labels import listed
from .store import BagStore


def read_seen(weights: str | Path | None) -> dict[str, str]:
    """{slide: fingerprint} of a weights file; {} where the file is not there, or is not one of `pretrain`."""
    from extractors.dino import about_weights

    return dict(about_weights(weights).get("slides", {})) if weights is not None else {}


def seen_words(features: Mapping[str, Any], out: Path, tested: Mapping[str, Iterable[str]]) -> list[str]:
    """What to know of test slides that the encoder has seen. `features`: what a model keeps of its features; `tested`:
    the test slides of each fold, "" for those of the table.

    Slides are known by their fingerprints: they may lie elsewhere, and go by other names.
    """
    seen = set(read_seen(features.get("recipe", {}).get("weights")).values())
    if not seen:
        return []
    store = BagStore(out)
    found = []
    for fold, slides in tested.items():
        shared = [s for s in slides if store.group(s).attrs.get("slide", {}).get("fingerprint") in seen]
        what = f"test slides{f' of {fold}' if fold else ''} were seen by the encoder when it was pre-trained"
        found.append(listed(f"{what}, which flatters the result", shared))
    return [warning for warning in found if warning]

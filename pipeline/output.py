"""The output folder: whose slides it holds, by which recipe they were made, and whether it can be written to."""

import json
import os
import platform
import shlex
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from .aside import aside
from .config import difference
from .errors import UsageError
from .folder import Folder
from .lock import running
from .outcome import Report, read_outcomes
from .stages import Recipe, versions
from .store import BagStore, SlideGroup, read_attrs


def read_run(out: Path) -> dict[str, Any]:
    """run.json, {} if there is none. A cut one is treated as none: all it says stands in the stores too."""
    try:
        return dict(json.loads((out / "run.json").read_bytes()))
    except (OSError, ValueError):
        return {}


def check_out(out: Path, folder: Folder, recipe: Recipe, redo: bool) -> None:
    """Refuse a folder that holds other slides, or another recipe (unless `redo`)."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is not a folder")
    there = read_run(out)
    if there and there["root"] != str(folder.root):
        raise UsageError(
            f"{out} holds the slides of {there['root']}, not of {folder.root}; give another folder with -o"
        )
    changes = difference(there["recipe"], recipe.as_dict()) if there else []
    if changes and not redo:
        done = sum(BagStore(out).group(name).status in ("complete", "empty") for name in folder.files)
        raise UsageError(
            f"{out} was made by another recipe:\n  " + "\n  ".join(changes) + f"\n--redo recomputes what depends on it "
            f"({done} finished slides); another folder with -o keeps both"
        )


def require_writable(out: Path) -> None:
    """UsageError if OUT cannot be written to, or made; leaves nothing behind."""
    there = next(folder for folder in (out, *out.parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UsageError(f"{out} cannot be written to: {error.strerror}") from error


def make_writable(out: Path) -> None:
    probe = out / f".probe-{os.getpid()}"
    try:
        for name in ("slides", "qc", "logs"):
            (out / name).mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UsageError(f"{out} cannot be written to: {error.strerror}") from error


def write_json(path: Path, value: Any) -> None:
    with aside(path) as part:
        part.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def write_run(out: Path, folder: Folder, recipe: Recipe) -> None:
    there = read_run(out)
    command = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join(sys.argv),
        "encoder": recipe.encoder_key,
    }
    hardware = {
        "host": platform.node(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
    }
    encoders = there.get("encoders", {}) | {
        recipe.encoder_key: {
            "name": recipe.config.encoder,
            "weights": recipe.weights_words,
            "weights_sha256": recipe.weights_sha256,
            "weights_file": recipe.config.weights,
            "force_scale": recipe.config.force_scale,
        }
    }
    about = {
        "schema": "slidestream/run",
        "root": str(folder.root),
        "recipe": recipe.as_dict(),
        "encoders": encoders,
        "versions": versions(),
        "hardware": hardware,
        "commands": [*there.get("commands", []), command],
    }
    write_json(out / "run.json", there | about)


def write_totals(out: Path, report: Report, encoder: str, batch_sizes: dict[str, int]) -> None:
    """What a run did, and the batch sizes that were found for an encoder, {device: tiles}."""
    totals = {
        "slides": report.counts,
        "tiles_encoded": report.tiles_encoded,
        "seconds": round(report.seconds, 1),
        "speed": report.meter.rates() if report.tiles_encoded else None,
        "bound_by": report.meter.sentence(),
    }
    about = read_run(out)
    known = about.get("batch_sizes", {})
    known[encoder] = known.get(encoder, {}) | batch_sizes
    write_json(out / "run.json", about | {"totals": totals, "batch_sizes": known})


def batch_sizes(out: Path, encoder: str) -> dict[str, int]:
    """The batch sizes that earlier runs found for an encoder, {device: tiles}."""
    return dict(read_run(out).get("batch_sizes", {}).get(encoder, {}))


def status_lines(out: Path) -> tuple[list[str], int]:
    """What stands in an output folder, in words, and the exit code that a run would have ended with."""
    about = read_run(out)
    if not about:
        raise UsageError(f"{out} is no output folder of `slidestream run`")
    store = BagStore(out)
    states = {name: store.group(name).status for name in store.slides()}
    rows = {row.slide: row for row in read_outcomes(out / "slides.csv")}
    faults = [
        row for row in rows.values() if row.status == "failed" and states.get(row.slide) not in ("complete", "empty")
    ]
    counts = {
        "done": sum(state == "complete" for state in states.values()),
        "empty": sum(state == "empty" for state in states.values()),
        "predicted by zoom, without features": 0,
        "unfinished": 0,
        "failed": len(faults),
    }
    for name in {name for name, state in states.items() if state == "writing"} - {row.slide for row in faults}:
        counts["predicted by zoom, without features" if _is_zoomed(store.group(name)) else "unfinished"] += 1
    holder = running(out)
    mended = {row.slide for row in rows.values() if row.status == "failed"} - {row.slide for row in faults}
    known = tuple(replace(row, status="done") if row.slide in mended else row for row in rows.values())
    lines = [
        f"slides of   {about['root']}",
        f"features    {', '.join(sorted(about['encoders']))}",
        *(
            f"            {key}: {e['weights']}"
            for key, e in sorted(about["encoders"].items())
            if e["weights_sha256"] == "random"
        ),
        f"slides      {', '.join(f'{number} {state}' for state, number in counts.items() if number) or 'none yet'}",
        f"run         {'going on: ' + holder if holder else 'none is going on'}",
        *(f"failed      {row.slide}: {row.stage}: {row.message}" for row in faults),
    ]
    return lines, Report(known).exit_code


def _is_zoomed(group: SlideGroup) -> bool:
    """True if a model has predicted it by zoom; its features are not whole."""
    found = (read_attrs(folder) for folder in (group.path / "predictions").glob("*"))
    return any("zoom" in attrs and attrs.get("status") == "complete" for attrs in found)

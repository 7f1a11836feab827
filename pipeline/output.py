"""The output folder: whose slides it holds, by which recipe they were made, and whether it can be written to."""

import json
import os
import platform
import shlex
import sys
import tempfile
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from .config import difference
from .errors import UsageError
from .folder import Folder
from .leases import FOLDER, Holder, held, living
from .outcome import Report, read_outcomes
from .places import is_remote, of_each, put
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
    if is_remote(out):
        probe = out / f".probe-{uuid.uuid4().hex}"
        try:
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            why = "there is no such bucket" if isinstance(error, FileNotFoundError) else error.strerror
            raise UsageError(f"{out} cannot be written to: {why}") from error
        return
    there = next(folder for folder in (out, *out.parents) if folder.exists())
    for folder in (there, out / FOLDER):  # the second may be another user's
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UsageError(f"{folder} cannot be written to: {error.strerror}") from error


def make_writable(out: Path) -> None:
    if is_remote(out):
        return
    probe = out / f".probe-{os.getpid()}"
    try:
        for name in ("slides", "qc", "logs"):
            (out / name).mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UsageError(f"{out} cannot be written to: {error.strerror}") from error


def write_json(path: Path, value: Any) -> None:
    put(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def machine() -> dict[str, Any]:
    """What this process runs on; features of the same machine are the same bits."""
    return {
        "host": platform.node(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
    }


def write_run(out: Path, folder: Folder, recipe: Recipe) -> None:
    there = read_run(out)
    command = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join(sys.argv),
        "encoder": recipe.encoder_key,
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
        "hardware": machine(),
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
    runs, running = living(out), held(out)
    store = BagStore(out)
    slides = store.slides()
    states = dict(zip(slides, of_each(lambda name: store.group(name).status, slides, out), strict=True))
    rows = {row.slide: row for row in read_outcomes(out / "slides.csv")}
    faults = [
        row
        for row in rows.values()
        if row.status == "failed" and row.slide not in running and states.get(row.slide) not in ("complete", "empty")
    ]
    counts = {
        "done": sum(state == "complete" for state in states.values()),
        "empty": sum(state == "empty" for state in states.values()),
        "predicted by zoom, without features": 0,
        "running": len(running),
        "waiting": max(0, min((run.course.left for run in runs), default=0) - len(running)),
        "unfinished": 0,
        "failed": len(faults),
    }
    begun = {name for name, state in states.items() if state == "writing"} - running.keys()
    for name in begun - {row.slide for row in faults}:
        counts["predicted by zoom, without features" if _is_zoomed(store.group(name)) else "unfinished"] += 1
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
        *_course_lines(runs, running),
        *(f"failed      {row.slide}: {row.stage}: {row.message}" for row in faults),
    ]
    return lines, Report(known).exit_code


def _course_lines(runs: list[Holder], running: dict[str, Holder]) -> list[str]:
    """The runs that are at work, what they hold, how long is left."""
    if not runs:
        return ["run         none is going on"]
    return [
        *(f"run         going on: {run.words()}; {run.course.settled} slides finished" for run in runs),
        *(f"running     {slide}" for slide in sorted(running)),
        f"left        {_left(runs)}",
    ]


def _left(runs: list[Holder]) -> str:
    """By the bytes of slide files, at the pace of all runs together."""
    pace = sum(run.course.bytes_per_s for run in runs)
    if not pace:
        return "not known before the first slide is finished"
    return f"about {in_words(min(run.course.left_bytes for run in runs) / pace)}"


def in_words(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _is_zoomed(group: SlideGroup) -> bool:
    """True if a model has predicted it by zoom; its features are not whole."""
    found = (read_attrs(folder) for folder in (group.path / "predictions").glob("*"))
    return any("zoom" in attrs and attrs.get("status") == "complete" for attrs in found)

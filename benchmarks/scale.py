"""Time and memory of the heads against the number of tiles, a forward pass and a training step.

    python benchmarks/scale.py [--heads longmil transmil] [--tiles 1024 16384 131072] [--device cuda] [--plot heads.png]

Every head and size has a process of its own, so that its peak of memory is its own: what the process holds at most,
less what it held before the first pass (on a GPU: torch's peak). Bags are torn tissue on a grid with random features of
384 channels; hagmil gets a tree of three levels, the finest with that many tiles. The slope is log time (memory) over
log tiles between the two largest sizes. A size is left out (-) where the one before it says that it would take longer
than --limit seconds.

Then, where longmil and attention are among the heads, at 16,384 tiles and in one process: local attention alone against
fused attention of all to all, and longmil against three fused full blocks. Writes benchmarks/out/scale.json.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from heads import Bag, BagLevel, Head, list_heads, load_head
from heads.layers import local_attention
from heads.recipe import Recipe

OUT = Path(__file__).parent / "out"
DIM, CLASSES, WIDTH, HEADS, RADIUS = 384, 2, 384, 4, 10
PASSES = ["forward", "step"]
LONG = 10.0  # seconds, beside which starting up is nothing
TILES = [1024 * 2**i for i in range(8)]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in list_heads()},
    "longmil, linear": ("longmil", {"global_layer": "linear"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="HEAD")
    parser.add_argument("--tiles", nargs="+", type=int, default=TILES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=float, default=120, help="seconds for one pass")
    parser.add_argument("--passes", nargs="+", default=PASSES, choices=PASSES)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.one:
        print(json.dumps(measured(wanted.one[0], int(wanted.one[1]), wanted.repeats, wanted.device, wanted.passes)))
        return
    rows = [row for name in wanted.heads for row in grown(name, wanted)]
    table(rows, wanted.tiles)
    both = {"longmil", "attention"} <= set(wanted.heads)
    pairs = side_by_side(16_384, wanted.repeats, wanted.device) if both else {}
    for words, value in pairs.items():
        print(f"{words}: {value:.2f}")
    OUT.mkdir(exist_ok=True)
    (OUT / "scale.json").write_text(json.dumps({"machine": machine(), "rows": rows, "pairs": pairs}, indent=1) + "\n")
    if wanted.plot and "step" in wanted.passes:
        plot(rows, wanted.plot)


def machine() -> str:
    return f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}"


def grown(name: str, wanted: argparse.Namespace) -> list[dict[str, Any]]:
    """A head at all sizes, as long as it is worth waiting for."""
    rows: list[dict[str, Any]] = []
    for tiles in sorted(wanted.tiles):
        if len(rows) > 1 and foreseen(rows, tiles) > wanted.limit:
            break
        command = [sys.executable, __file__, "--one", name, str(tiles), "--repeats", str(wanted.repeats)]
        command += ["--device", wanted.device, "--passes", *wanted.passes]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{name}, {tiles} tiles: {done.stderr.strip().splitlines()[-1:]}")
            break
        rows.append(json.loads(done.stdout))
        print(" | ".join(f"{key} {words(value)}" for key, value in rows[-1].items()), flush=True)
    return rows


def foreseen(rows: list[dict[str, Any]], tiles: int) -> float:
    """Seconds of a pass of that many tiles, if it goes on as from the size before the last to the last."""
    what = next(f"{one} s" for one in reversed(PASSES) if f"{one} s" in rows[-1])
    return float(rows[-1][what] * (tiles / rows[-1]["tiles"]) ** max(1.0, slope(rows, what)))


def slope(rows: list[dict[str, Any]], what: str) -> float:
    """Not a number where there was too little to be measured."""
    a, b = rows[-2:]
    if min(a[what], b[what]) <= 0:
        return math.nan
    return math.log(b[what] / a[what]) / math.log(b["tiles"] / a["tiles"])


def measured(name: str, tiles: int, repeats: int, device: str, passes: list[str]) -> dict[str, Any]:
    """Times of a pass, and the most memory that was held."""
    torch.manual_seed(0)
    kind, options = VARIANTS[name]
    head = load_head(kind, DIM, CLASSES, **options).to(device)
    bag = (tree if head.needs.levels > 1 else flat)(tiles).to(device)
    optimizer = Recipe(lr=1e-5).make_optimizer(head.parameters())
    works = {"forward": lambda: looked(head, bag), "step": lambda: stepped(head, bag, optimizer)}
    row: dict[str, Any] = {"head": name, "tiles": tiles}
    before = held_from_now(device)
    for what in passes:
        row[f"{what} s"] = timed(works[what], repeats, device)
        row[f"{what} MB"] = (held(device) - before) / 1e6
    return row


@torch.no_grad()
def looked(head: Head, bag: Bag) -> None:
    head.eval()(bag)


def stepped(head: Head, bag: Bag, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    head.loss(head.train()(bag), 1).backward()
    optimizer.step()


def timed(work: Any, repeats: int, device: str) -> float:
    """The median of `repeats` passes after one that does not count; of one alone if it takes longer than LONG."""
    times = [once(work, device)]
    if times[0] > LONG:
        return times[0]
    return median(once(work, device) for _ in range(repeats))


def once(work: Any, device: str) -> float:
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def held_from_now(device: str) -> float:
    """The bytes held now, from which on `held` counts."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins again
    return held(device)


def held(device: str) -> float:
    """The most bytes held."""
    if device != "cpu":
        return float(torch.cuda.max_memory_allocated())
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024.0 * int(peak.split()[1])


def places(tiles: int) -> np.ndarray:
    """(tiles, 2) of torn tissue: a square of which seven tenths are kept, in pieces of 8 × 8 tiles."""
    random = np.random.default_rng(tiles)
    pieces = math.ceil(math.sqrt(tiles / 0.7) / 8)
    kept = random.permutation(pieces**2)[: math.ceil(tiles / 64)]
    corners = np.stack([kept % pieces, kept // pieces], axis=1) * 8
    inside = np.stack(np.meshgrid(np.arange(8), np.arange(8)), axis=-1).reshape(-1, 2)
    return (corners[:, None] + inside).reshape(-1, 2)[:tiles]


def flat(tiles: int) -> Bag:
    features = torch.randn(tiles, DIM, generator=torch.Generator().manual_seed(tiles))
    return Bag.flat(features, grid=places(tiles))


def tree(tiles: int) -> Bag:
    """Three levels, each tile with four children."""
    levels = []
    for i in range(3):
        count = tiles // 4 ** (2 - i)
        features = torch.randn(count, DIM, generator=torch.Generator().manual_seed(count))
        levels.append(BagLevel.of(features, parent=np.arange(count) // 4 if i else np.full(count, -1)))
    return Bag(levels)


def side_by_side(tiles: int, repeats: int, device: str) -> dict[str, float]:
    """How many times faster, forward or whole step, in turns in this process."""
    torch.manual_seed(0)
    bag = flat(tiles).to(device)
    q, k, v = torch.randn(tiles, 3, HEADS, WIDTH // HEADS, device=device).permute(1, 2, 0, 3)  # as longmil has them
    heads = {
        "longmil": load_head("longmil", DIM, CLASSES).to(device),
        "full": load_head("attention", DIM, CLASSES, blocks=3).to(device),
    }
    optimizers = {name: Recipe(lr=1e-5).make_optimizer(head.parameters()) for name, head in heads.items()}
    works = {
        "local": lambda: local_attention(q, k, v, bag.grid, RADIUS),
        "fused": lambda: F.scaled_dot_product_attention(q[None], k[None], v[None]),
        **{f"{name} forward": lambda h=head: looked(h, bag) for name, head in heads.items()},
        **{f"{name} step": lambda n=name: stepped(heads[n], bag, optimizers[n]) for name in heads},
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(timed(work, 1, device))
    medians = {name: median(values) for name, values in times.items()}
    return {
        "local attention against fused full attention, times faster": medians["fused"] / medians["local"],
        "longmil against three full blocks, forward": medians["full forward"] / medians["longmil forward"],
        "longmil against three full blocks, training step": medians["full step"] / medians["longmil step"],
    }


def table(rows: list[dict[str, Any]], sizes: list[int]) -> None:
    for what in (f"{one} {unit}" for unit in ("s", "MB") for one in PASSES if any(f"{one} s" in row for row in rows)):
        print(f"\n{what:20}" + "".join(f"{n:>10}" for n in sizes) + "     slope")
        for name in dict.fromkeys(row["head"] for row in rows):
            mine = [row for row in rows if row["head"] == name]
            by_size = {row["tiles"]: row.get(what) for row in mine}
            cells = "".join(f"{words(by_size.get(n)):>10}" for n in sizes)
            print(f"{name:20}{cells}     " + (f"{slope(mine, what):.2f}" if len(mine) > 1 else "-"))


def words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return "-" if value is None else str(value)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for i, name in enumerate(dict.fromkeys(row["head"] for row in rows)):
        style = {"marker": "o", "ms": 3, "color": f"C{i % 7}", "ls": ("-", "--", ":")[i // 7], "label": name}
        for axis, what in zip(axes, ("step s", "step MB"), strict=True):
            mine = [row for row in rows if row["head"] == name and row[what] > 0]
            axis.loglog([row["tiles"] for row in mine], [row[what] for row in mine], **style)
    for axis, what in zip(axes, ("training step, s", "training step, MB"), strict=True):
        axis.set(xlabel="tiles", ylabel=what)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

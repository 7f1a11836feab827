"""The stages, as plain functions of plain values: segment, tile, encode. No cluster here; call them in a debugger.

`prepare` takes one slide from its file to the table of its tiles; `encode` takes a stream of prepared slides and
yields a row as each is finished.
"""

import importlib
import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from extractors import Encoder, EncoderFacts, load_encoder

from .config import Config, EncodeConfig, EngineConfig, TileConfig, TissueConfig, digest
from .draw import overview, save_png
from .encode import Encoded, Settings, encode_slides
from .errors import BrokenBag, SlideError, UsageError, slide_door
from .fingerprint import Fingerprint, fingerprint, stamp
from .meter import Meter
from .outcome import Outcome, failed
from .quadtree import QuadTree, build_quadtree
from .readers import open_slide
from .rows import Shelf, Work, nothing_of
from .scale import check_resolution
from .slide import Slide, thumbnail
from .store import BagStore, SlideGroup, read_attrs, short_name
from .tissue import TissueMask, tissue_in

# Settings that are no part of what a store holds: of one of its encoders, or of how the work is done.
OTHERS = {*EncodeConfig.model_fields, *EngineConfig.model_fields} - {"dtype"}
ZOOMED = "predicted by zoom, its features are not kept"  # of a slide whose features are not whole
Tiler = Callable[[Slide, TissueMask, TileConfig], QuadTree]


@dataclass(frozen=True)
class SlideFile:
    """A slide to process: its identity in the store, its file, and the µm per pixel that a table gives for it."""

    name: str
    path: Path
    mpp: float | None = None


@dataclass(frozen=True)
class Recipe:
    """A Config made definite by the facts of its encoder: everything that decides the bytes of the store."""

    config: Config  # with tile_px filled in
    facts: EncoderFacts
    encoder_key: str
    weights_sha256: str
    weights_words: str
    tiler: Tiler | None = None

    def feature_hash(self, tile_px: int, mpp: list[float]) -> str:
        """What fits a model: encoder, weights, preprocessing, the scale of the encoded levels. It knows no slide."""
        facts = self.facts
        preprocessing = {"tile_px": tile_px, "crop_px": facts.crop_px, "mean": list(facts.mean), "std": list(facts.std)}
        identity = {"encoder": facts.name, "weights": self.weights_sha256, "preprocessing": preprocessing, "mpp": mpp}
        return digest(identity)

    def hash_of(self, tiles: dict[str, Any]) -> str:
        """The feature_hash for stored tiles (the facts of a tree), whoever made them."""
        levels = [tiles["levels"][k] for k in tiles["encoded"]]
        return self.feature_hash(levels[0]["tile_px"], [level["mpp"] for level in levels])

    def as_dict(self) -> dict[str, Any]:
        """The settings, but for the encoder's: a second encoder is another group beside the first."""
        settings = self.config.model_dump(mode="json")
        return {name: value for name, value in settings.items() if name not in OTHERS}


def make_recipe(config: Config, encoder: Encoder, tiler: Tiler | None = None) -> Recipe:
    """Check the tiles against what the encoder was made for. Raises UsageError unless `force_scale`."""
    facts = encoder.facts
    config = config.model_copy(update={"tile_px": config.tile_px or facts.tile_px})
    tile_px = config.tile_px or facts.tile_px
    misfit = facts.misfit(tile_px, config.mpp)
    if misfit and not config.force_scale:
        raise UsageError(f"{misfit}. Change --mpp or --tile-px, or pass --force-scale")
    sha = encoder.weights_sha256
    key = facts.name.replace("/", "--").replace(":", "--")
    standard = sha == "none" or config.weights is None
    key += "" if standard else f"@{sha[:8]}"
    return Recipe(config, facts, key, sha, encoder.weights_words, tiler)


def load_tiler(name: str | None) -> Tiler | None:
    """`module:function` → the function; None → None, the quadtree. Raises UsageError."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"tiler {name!r}: {error}. It must be module:function, importable from PYTHONPATH") from error
    if not callable(found):
        raise UsageError(f"tiler {name!r} is not a function")
    tiler: Tiler = found
    return tiler


def segment(slide: Slide, config: TissueConfig) -> tuple[TissueMask, np.ndarray]:
    """Where the tissue of a slide is, and the thumbnail (h, w, 3) uint8 on which it was found."""
    view = thumbnail(slide, config.tissue_mpp)
    return tissue_in(view, config), view.rgb


def tile(slide: Slide, mask: TissueMask, config: TileConfig, tiler: Tiler | None = None) -> QuadTree:
    """Which tiles of a slide are taken."""
    if tiler is None:
        settings = config.model_dump(exclude={"tiler", "tile_px"})
        return build_quadtree(slide, mask, tile_px=config.tile_px or 224, **settings)
    tree = tiler(slide, mask, config)
    if not isinstance(tree, QuadTree):
        raise UsageError(f"the tiler returned {type(tree).__name__}, not a QuadTree")
    return tree


def _refuse_misfit(tree: QuadTree, recipe: Recipe) -> None:
    """A tiler may return any scale; the encoder was made for some."""
    misfit = recipe.facts.misfit(tree.tile_px, tree.levels[-1].mpp) if tree.levels else None
    if misfit and not recipe.config.force_scale:
        raise UsageError(f"{misfit}. The tiler returned such tiles; change it, or pass --force-scale")


def prepare(file: SlideFile, recipe: Recipe, out: Path) -> Outcome:
    """Open, segment and tile one slide and store the result; what is stored already and still holds is kept.

    Returns a row with status `ready`, `empty` or `failed`. Never raises a SlideError.
    """
    started = perf_counter()
    try:
        with _open(file, recipe) as slide:
            outcome = _prepare(file, recipe, out, slide, fingerprint(file.path))
    except SlideError as error:
        outcome = failed(file.name, error)
        group = BagStore(out).group(file.name)
        if group.status in ("complete", "empty"):  # of a file that is not this one any more
            group.update(status="writing")
    return outcome.after(perf_counter() - started)


def _open(file: SlideFile, recipe: Recipe) -> Slide:
    return open_slide(file.path, file.mpp, recipe.config.reader, mpp_source="csv")


def _prepare(file: SlideFile, recipe: Recipe, out: Path, slide: Slide, print_: Fingerprint) -> Outcome:
    config, group = recipe.config, BagStore(out).group(file.name)
    if recipe.tiler is None:  # said before the tissue is looked for; a tiler decides for itself
        check_resolution(str(slide.path), slide.mpp, config.mpp, config.allow_upsampling)
    tissue_hash = digest([print_.sha256, config.tissue.model_dump(), slide.mpp, slide.reader])
    kept = _kept_tissue(group, tissue_hash)
    mask, thumbnail = kept if kept else segment(slide, config.tissue)
    tree = tile(slide, mask, config.tile, recipe.tiler)
    _refuse_misfit(tree, recipe)
    stands = kept is not None and _tiles_stand(group, tree)
    # A second encoder on a slide that is whole: the features that are there stay usable while it works.
    status = "complete" if stands and group.status == "complete" else "writing"
    group.begin(status, **_facts(file, recipe, slide, print_, mask))
    if kept is None:
        group.write_tissue(mask, thumbnail, tissue_hash)
    if not stands:
        group.write_tiles(tree)
    row = Outcome(
        file.name,
        "ready",
        message="; ".join(group.attrs["scale"]["warnings"]),
        mpp=slide.mpp,
        mpp_source=slide.mpp_source,
        reader=slide.reader,
        width=slide.size[0],
        height=slide.size[1],
        tissue_mm2=round(mask.area_mm2, 4),
        tiles=len(tree),
    )
    found = f"{mask.area_mm2:.3g} mm2 of tissue   {len(tree)} tiles on {len(tree.levels)} levels"
    words = f"{file.name}   {slide.mpp:.4g} um/px   {found}"
    save_png(qc_path(out, file.name), overview(thumbnail, mask, tree, words))
    if len(tree) == 0:
        group.finish("empty", counts={"tiles": [0] * len(tree.levels), "invalid": 0})
        return replace(row, status="empty", message="; ".join(filter(None, [_why_empty(mask.area_mm2), row.message])))
    return row


def _why_empty(tissue_mm2: float) -> str:
    return f"no tile has enough of the {tissue_mm2:.3g} mm² of tissue (min_tissue)" if tissue_mm2 else "no tissue found"


def _kept_tissue(group: SlideGroup, tissue_hash: str) -> tuple[TissueMask, np.ndarray] | None:
    """What an earlier run stored, if it was made of the same slide with the same settings and reads whole."""
    if group.attrs.get("hashes", {}).get("tissue") != tissue_hash:
        return None
    try:
        return group.mask(), group.thumbnail()
    except BrokenBag:
        return None


def _tiles_stand(group: SlideGroup, tree: QuadTree) -> bool:
    try:
        return group.attrs["hashes"].get("tiles") == tree.hash and len(group.tree()) == len(tree)
    except BrokenBag:
        return False


def _facts(file: SlideFile, recipe: Recipe, slide: Slide, print_: Fingerprint, mask: TissueMask) -> dict[str, Any]:
    """The attributes of the slide's group, as the store's schema wants them."""
    return {
        "slide": {
            "path": file.name,
            "size_bytes": print_.size,
            "mtime_ns": print_.mtime_ns,
            "fingerprint": print_.sha256,
            "vendor": slide.vendor,
            "width": slide.size[0],
            "height": slide.size[1],
            "levels": [[level.width, level.height, *level.downsample] for level in slide.levels],
            "bounds": list(slide.bounds) if slide.bounds else None,
        },
        "scale": {
            "mpp": slide.mpp,
            "source": slide.mpp_source,
            "given": file.mpp,
            "objective": slide.tags.objective,
            "warnings": [*slide.warnings, *mask.warnings],
        },
        "reader": {
            "requested": recipe.config.reader,
            "used": slide.reader,
            "version": slide.reader_version,
            "refusals": list(slide.refusals),
        },
        "recipe": recipe.as_dict(),
        "tissue_mm2": round(mask.area_mm2, 4),
        "versions": versions(),
    }


@cache
def versions() -> dict[str, str]:
    names = (
        "slidestream",
        "torch",
        "timm",
        "zarr",
        "dask",
        "numpy",
        "opencv-python-headless",
        "scikit-image",
        "openslide-bin",
        "tiffslide",
    )
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def qc_path(out: Path, slide: str) -> Path:
    parts = Path(slide)
    return out / "qc" / parts.parent / short_name(parts.name, ".png")


def encode(
    slides: Iterable[tuple[SlideFile, Outcome]],
    encoder: Encoder,
    out: Path,
    recipe: Recipe,
    device: str = "cpu",
    on_tiles: Callable[[int, Meter], None] = lambda count, so_far: None,
    settings: Settings = Settings(),
) -> Iterator[tuple[Outcome, Encoded]]:
    """Encode prepared slides as they come; yields the row of each as it is finished, with status `done` or `failed`.

    `encoder` is loaded on `device`. `slides` is taken from by another thread, ahead of what is encoded.
    """
    rows: dict[str, Outcome] = {}
    groups: dict[str, SlideGroup] = {}
    broken: dict[str, Outcome] = {}  # filled by the thread that takes from `slides`

    def works() -> Iterator[Work]:
        for file, row in slides:
            rows[file.name], groups[file.name] = row, BagStore(out).group(file.name)
            try:
                yield _work(file, groups[file.name], encoder, recipe, row.reader)
            except SlideError as error:  # what `prepare` wrote is not there any more
                broken[file.name] = failed(file.name, error)
                yield nothing_of(file.name)

    for result in encode_slides(works(), encoder, device, on_tiles, settings):
        row, group = rows.pop(result.slide), groups.pop(result.slide)
        fault = broken.pop(result.slide, None)
        yield fault or _finish(row, group, result, recipe, encoder), result


def _finish(row: Outcome, group: SlideGroup, result: Encoded, recipe: Recipe, encoder: Encoder) -> Outcome:
    """Commit a slide whose chunks are all written; its own attributes come last."""
    row = row.after(result.meter.seconds).at_speed(result.meter)
    if result.error is not None:
        fault = failed(result.slide, result.error)
        return replace(row, status="failed", stage=fault.stage, error=fault.error, message=fault.message)
    if result.invalid:
        row = replace(row, message="; ".join(filter(None, [row.message, invalid_words(result.invalid)])))
    group.features(recipe.encoder_key).finish(cosine_to_fp32=encoder.cosine_to_fp32)
    tiles = [level["stop"] - level["start"] for level in read_attrs(group.path / "tiles")["levels"]]
    group.finish("complete", counts={"tiles": tiles, "invalid": result.invalid})
    return replace(row, status="done")


def invalid_words(count: int) -> str:
    return f"{count} tiles cannot be decoded and are marked invalid"


def _work(file: SlideFile, group: SlideGroup, encoder: Encoder, recipe: Recipe, reader: str) -> Work:
    tree, features = group.tree(), group.features(recipe.encoder_key)
    attrs = {
        "encoder": encoder.facts.as_dict(),
        "weights": recipe.weights_words,
        "weights_sha256": recipe.weights_sha256,
        "precision": encoder.precision,
        "compiled": recipe.config.compile,
        "feature_hash": recipe.hash_of(tree.facts()),
        "tiles": tree.hash,
        "reader": reader,
        "levels": list(tree.encoded_levels),
    }
    features.begin(len(tree.encoded_rows), recipe.facts.dim, recipe.config.dtype, **attrs)
    return work_on(file, group, recipe, tree, features)


def work_on(file: SlideFile, group: SlideGroup, recipe: Recipe, tree: QuadTree, features: Shelf) -> Work:
    """The tiles of a prepared slide, on their way to `features`."""
    opened = group.attrs["slide"]

    def unchanged() -> bool:
        with slide_door(str(file.path), "encode"):
            return stamp(file.path)[:2] == (opened["size_bytes"], opened["mtime_ns"])

    return Work(file.name, partial(_open, file, recipe), unchanged, tree, features)


def is_prepared(file: SlideFile, group: SlideGroup, recipe: Recipe) -> bool:
    """True if the store holds the tissue and the tiles that this recipe makes of this slide file."""
    attrs = group.attrs
    if attrs.get("recipe") != recipe.as_dict() or not read_attrs(group.path / "tiles"):
        return False
    return bool(attrs["scale"]["given"] == file.mpp and _same_file(file.path, attrs["slide"]))


def is_current(file: SlideFile, group: SlideGroup, recipe: Recipe, deep: bool = False) -> bool:
    """True if the store holds all that this recipe makes of this slide file; `deep` reads every array again."""
    attrs, tiles = group.attrs, read_attrs(group.path / "tiles")
    if attrs.get("status") not in ("complete", "empty"):
        return False
    if deep and recipe.tiler is not None:
        return False  # its function may have changed under the same name: ask it again; equal tiles keep their features
    if not is_prepared(file, group, recipe):
        return False
    try:
        if deep:
            group.mask(), group.thumbnail(), group.tree()
        if attrs["status"] == "empty":
            return True
        features = group.features(recipe.encoder_key)
        facts = features.attrs
        wanted = {
            "status": "complete",
            "feature_hash": recipe.hash_of(tiles),
            "tiles": attrs["hashes"]["tiles"],
            "reader": attrs["reader"]["used"],
        }
        if recipe.config.precision != "auto":  # auto takes what there is: one machine differs from the next
            wanted["precision"] = recipe.config.precision
        if any(facts.get(name) != value for name, value in wanted.items()):
            return False
        if deep:
            features.read()
        return features.chunks_are_there()
    except BrokenBag:
        return False


def stored_outcome(name: str, group: SlideGroup) -> Outcome:
    """The row of a slide that needed no work, from what its store says."""
    attrs = group.attrs
    invalid, warnings = attrs["counts"]["invalid"], "; ".join(attrs["scale"]["warnings"])
    notes = [
        _why_empty(attrs["tissue_mm2"]) if attrs["status"] == "empty" else "",
        warnings,
        invalid_words(invalid) if invalid else "",
        ZOOMED if attrs["status"] == "writing" else "",
    ]
    return Outcome(
        name,
        "empty" if attrs["status"] == "empty" else "done",
        message="; ".join(filter(None, notes)),
        mpp=attrs["scale"]["mpp"],
        mpp_source=attrs["scale"]["source"],
        reader=attrs["reader"]["used"],
        width=attrs["slide"]["width"],
        height=attrs["slide"]["height"],
        tissue_mm2=attrs["tissue_mm2"],
        tiles=sum(attrs["counts"]["tiles"]),
    )


def _same_file(path: Path, stored: dict[str, Any]) -> bool:
    """Size and time first; where the time differs (a copy), what is in it."""
    try:
        size, mtime_ns, *_ = stamp(path)
        if size != stored["size_bytes"]:
            return False
        return mtime_ns == stored["mtime_ns"] or fingerprint(path).sha256 == stored["fingerprint"]
    except (OSError, SlideError):
        return False  # it is tried again, and told there


def open_encoder(config: Config) -> Encoder:
    return load_encoder(config.encoder, config.weights)

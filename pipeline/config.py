"""Every setting, with its unit and its bounds. Flags = TOML keys = Python keyword names.

A `Config` is the recipe: equal recipes on equal slides give equal bytes. How many workers do the work, and where, is
no part of it.
"""

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .errors import UsageError, nearest

PRESETS: dict[str, dict[str, Any]] = {
    name: {
        "levels": levels,
        "min_tissue": 0.0,
        "min_region_tissue": 0.1,
        "keep_background": True,
        "encode_levels": "finest",
    }
    for name, levels in (("hvit", 4), ("hipt", 5))
}


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and not isinstance(cls.model_fields[info.field_name or ""].default, bool):
            raise ValueError("true and false are no values for it")
        return value


class TissueConfig(Part):
    """Where tissue is looked for and how small a piece of it, or a hole in it, counts."""

    tissue_mpp: float = Field(8.0, ge=1, le=64, description="µm per pixel of the thumbnail that is segmented")
    min_density: float = Field(
        0.06, gt=0, le=1, description="optical density above glass where tissue may end; lower it for faded slides"
    )
    min_area_um2: float = Field(16_000.0, ge=0, description="smaller pieces are debris")
    max_hole_um2: float = Field(50_000.0, ge=0, description="smaller holes belong to the tissue")
    remove_pen: bool = Field(True, description="off for stains that are blue or green as ink is")


class TileConfig(Part):
    """Which tiles are taken."""

    mpp: float = Field(0.5, ge=0.01, le=500, description="µm per pixel of the finest tiles")
    levels: int = Field(
        3, ge=1, le=8, description="levels of the quadtree; each is half as fine as the next; 1 = a flat grid"
    )
    tile_px: int | None = Field(None, ge=8, le=8192, description="edge of a tile in pixels; by default the encoder's")
    min_tissue: float = Field(0.1, ge=0, le=1, description="a finest tile needs this share of tissue")
    min_region_tissue: float = Field(0.0, ge=0, le=1, description="its coarsest ancestor needs this share of tissue")
    keep_background: bool = Field(False, description="keep all children of a kept root, also those without tissue")
    encode_levels: Literal["all", "finest"] | Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = Field(
        "all", description="levels that get features: all, finest or their µm/px"
    )
    overlap: float = Field(0.0, ge=0, lt=0.95, description="share of a tile that the next one repeats (one level only)")
    origin: tuple[float, float] = Field((0.0, 0.0), description="level-0 px (x, y) at which the grid begins")
    tiler: str | None = Field(
        None, description="module:function (slide, mask, config) -> QuadTree in place of the quadtree"
    )
    allow_upsampling: bool = Field(False, description="take slides whose best level is coarser than asked")

    @field_validator("encode_levels", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in ("all", "finest"):
            try:
                return tuple(float(part) for part in value.split(","))
            except ValueError as error:
                raise ValueError(f"{value!r} is neither all nor finest nor µm/px with commas between") from error
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _overlap_is_flat(self) -> Self:
        if self.overlap and self.levels > 1:
            raise ValueError("overlapping tiles do not nest: overlap needs levels = 1")
        return self

    @model_validator(mode="after")
    def _levels_to_encode_exist(self) -> Self:
        there = [self.mpp * 2**k for k in range(self.levels)]
        for wish in () if self.tiler or isinstance(self.encode_levels, str) else self.encode_levels:
            if not any(abs(mpp / wish - 1) < 0.01 for mpp in there):
                known = ", ".join(f"{mpp:g}" for mpp in there)
                raise ValueError(f"encode_levels: there is no level of {wish:g} µm/px; there are {known}")
        return self


class EncodeConfig(Part):
    """What turns a tile into numbers."""

    encoder: str = Field(
        "resnet50", min_length=1, description="name, timm/<any>, or module:function; see `slidestream doctor`"
    )
    weights: str | None = Field(
        None, description="a local checkpoint, or `random` for benchmarks; by default the published ones"
    )
    force_scale: bool = Field(False, description="take tile sizes and resolutions that the encoder was not made for")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="what the encoder computes in; auto: bf16 (or fp16) where the device multiplies in it"
    )
    compile: bool = Field(False, description="compile the encoder: slow to start, faster on some GPUs")
    dtype: Literal["float16", "float32"] = Field("float16", description="type of the stored features")


class EngineConfig(Part):
    """How the work is done on each device; none of it is needed, and features do not depend on it.

    (On a GPU their last bits may depend on `batch_size`; a run that is resumed keeps the one that was found.)
    """

    batch_size: int | None = Field(
        None, ge=1, le=8192, description="tiles a batch; by default 16, on a GPU found by trying"
    )
    readers: int | None = Field(None, ge=1, le=256, description="threads that read tiles; by default found by trying")
    queue_mb: int = Field(512, ge=16, le=65536, description="MB of tiles and blocks that may wait for the encoder")


class Config(TissueConfig, TileConfig, EncodeConfig, EngineConfig):
    """The whole recipe, flat. `config.tissue`, `config.tile` and `config.encode` are its parts."""

    reader: Literal["auto", "openslide", "tiffslide", "image"] = Field(
        "auto", description="which reader opens the slides"
    )

    @property
    def tissue(self) -> TissueConfig:
        return TissueConfig(**{name: getattr(self, name) for name in TissueConfig.model_fields})

    @property
    def tile(self) -> TileConfig:
        return TileConfig(**{name: getattr(self, name) for name in TileConfig.model_fields})

    @property
    def encode(self) -> EncodeConfig:
        return EncodeConfig(**{name: getattr(self, name) for name in EncodeConfig.model_fields})


def make_config(preset: str | None = None, **settings: Any) -> Config:
    """A Config from a preset and single settings, which win over it. UsageError names what is wrong."""
    if preset is not None and str(preset) not in PRESETS:
        raise UsageError(nearest(str(preset), list(PRESETS), "preset"))
    values = (PRESETS[str(preset)] if preset is not None else {}) | settings
    for key in values:
        if key not in Config.model_fields:
            raise UsageError(nearest(key, list(Config.model_fields), "setting"))
    try:
        return Config(**values)
    except ValidationError as error:
        faults = [f"{'.'.join(str(p) for p in e['loc'][:1]) or 'settings'}: {e['msg']}" for e in error.errors()]
        raise UsageError("; ".join(faults)) from error


def read_toml(path: str | Path) -> dict[str, Any]:
    """The keys of a TOML file. Raises UsageError."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a TOML file: {error}") from error


def digest(value: Any) -> str:
    """sha256 of anything that JSON can hold, or of a part of the configuration, in one fixed spelling."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The settings in which two recipes differ, a line each."""
    keys = sorted(old.keys() | new.keys())
    return [f"{key}: {old.get(key)!r} → {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]

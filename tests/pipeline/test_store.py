"""The store on disk: its layout, what counts as whole, and that damage is never read as data."""

import errno
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from pipeline import places
from pipeline import store as module
from pipeline.errors import BrokenBag, UsageError
from pipeline.quadtree import QuadTree, build_quadtree
from pipeline.readers import open_slide
from pipeline.store import BagStore, SlideGroup, group_path, read_attrs, short_name
from pipeline.tissue import TissueMask

RNG = np.random.default_rng(0)
FACTS = {"slide": {"path": "case1/a.svs"}, "scale": {"mpp": 0.5}}


def mask() -> TissueMask:
    image = np.random.default_rng(1).random((9, 11)) > 0.3
    return TissueMask(image, (8.0, 8.5), 4.1, "brightfield", ("a warning",))


def tree(encode_levels="all", levels=2, size=(88, 77), **options) -> QuadTree:
    slide = open_slide(np.zeros((*size[::-1], 3), np.uint8), mpp=0.5)
    return build_quadtree(slide, mask(), mpp=0.5, tile_px=8, levels=levels, encode_levels=encode_levels, **options)


def thumbnail() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 255, (9, 11, 3), np.uint8)


def features_of(table: QuadTree, dim=5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    m = len(table.encoded_rows)
    x, valid = rng.normal(size=(m, dim)).astype(np.float16), rng.random(m) > 0.1
    x[~valid] = 0
    return x, valid


def begin(store: BagStore, table: QuadTree, slide="case1/a.svs") -> SlideGroup:
    group = store.group(slide)
    group.begin(**FACTS | {"slide": {"path": slide}})
    group.write_tissue(mask(), thumbnail(), "tissue hash")
    group.write_tiles(table)
    return group


def write_features(group: SlideGroup, key: str, x: np.ndarray, valid: np.ndarray, **attrs) -> None:
    features = group.features(key)
    features.begin(len(x), x.shape[1], str(x.dtype), **attrs)
    for chunk in range(-(-len(x) // module.CHUNK_ROWS)):
        rows = slice(chunk * module.CHUNK_ROWS, (chunk + 1) * module.CHUNK_ROWS)
        features.write_chunk(chunk, x[rows], valid[rows])
    features.finish()


def whole(store: BagStore, table: QuadTree, slide="case1/a.svs", key="mine") -> SlideGroup:
    group = begin(store, table, slide)
    write_features(group, key, *features_of(table), tiles=table.hash)
    group.finish("complete", counts={"tiles": [len(table)], "invalid": 0})
    return group


@pytest.fixture
def store(tmp_path):
    return BagStore(tmp_path)


# --- the layout, read with plain zarr --------------------------------------------------------------------------------


def codecs(array: zarr.Array) -> list[str]:
    return [codec.to_dict()["name"] for codec in array.metadata.codecs]


def test_layout_is_that_of_the_design(store, tmp_path):
    table = tree()
    group = whole(store, table)
    group.write_prediction(
        "m", {"logits": np.ones(2, np.float32), "weight": np.ones(4, np.float32)}, classes=["a", "b"]
    )
    found = zarr.open_group(tmp_path / "slides/case1/a.svs.zarr", mode="r")
    n, x = len(table), features_of(table)[0]
    expected = {
        "tissue/mask": ((9, 11), "uint8", (9, 11)),
        "tissue/thumbnail": ((9, 11, 3), "uint8", (9, 11, 3)),
        "tiles/grid": ((n, 2), "int32", (n, 2)),
        "tiles/xy": ((n, 2), "int32", (n, 2)),
        "tiles/tissue": ((n,), "float32", (n,)),
        "tiles/parent": ((n,), "int32", (n,)),
        "features/mine/x": (x.shape, "float16", (len(x), 5)),  # less than 2,048 rows: one chunk of its own size
        "features/mine/valid": ((len(x),), "bool", (len(x),)),
        "predictions/m/logits": ((2,), "float32", (2,)),
        "predictions/m/weight": ((4,), "float32", (4,)),
    }
    arrays = {path: item for path, item in found.members(max_depth=None) if isinstance(item, zarr.Array)}
    assert {p: (a.shape, str(a.dtype), a.chunks) for p, a in arrays.items()} == expected
    for path, array in arrays.items():
        assert codecs(array)[-1] == "crc32c", path
        assert codecs(array) == (["bytes", "crc32c"] if path.endswith("/x") else ["bytes", "zstd", "crc32c"]), path
    assert found.metadata.zarr_format == 3
    assert dict(found.attrs) == FACTS | {
        "schema": "slidestream/bag",
        "schema_version": 1,
        "status": "complete",
        "hashes": {"tissue": "tissue hash", "tiles": table.hash},
        "counts": {"tiles": [n], "invalid": 0},
    }
    assert list(found["tiles"].attrs["levels"][0]) == ["mpp", "tile_px", "span_px", "start", "stop"]
    assert [level["mpp"] for level in found["tiles"].attrs["levels"]] == [1.0, 0.5], "coarse → fine"
    assert dict(found["features/mine"].attrs) == {"tiles": table.hash, "status": "complete"}
    assert found["predictions/m"].attrs["status"] == "complete"
    np.testing.assert_array_equal(found["features/mine/x"][...], x)
    np.testing.assert_array_equal(found["tissue/mask"][...], mask().image)


def test_what_is_written_is_what_is_read(store):
    table = tree("finest", origin=(3.0, -2.5))
    group = whole(store, table)
    again = group.tree()
    assert again.hash == table.hash
    assert again.encoded_levels == (1,)
    for name in ("grid", "xy", "tissue", "parent"):
        np.testing.assert_array_equal(getattr(again, name), getattr(table, name))
        assert getattr(again, name).dtype == getattr(table, name).dtype
    for k in range(2):
        np.testing.assert_array_equal(again.boxes(k), table.boxes(k))
    stored = group.mask()
    np.testing.assert_array_equal(stored.image, mask().image)
    assert stored.image.dtype == bool
    facts = (stored.downsample, stored.mpp, stored.method, stored.warnings)
    assert facts == ((8.0, 8.5), 4.1, "brightfield", ("a warning",))
    np.testing.assert_array_equal(group.thumbnail(), thumbnail())


@pytest.mark.parametrize("kind", ["points", "overlap"])
def test_trees_on_no_grid_and_with_overlap(store, kind):
    slide = open_slide(np.zeros((77, 88, 3), np.uint8), mpp=0.5)
    points = QuadTree.from_points(slide, [(10.5, 20.5), (3, 4), (80, 70)], mpp=0.5, tile_px=8)
    table = points if kind == "points" else tree(levels=1, overlap=0.25)
    group = whole(store, table)
    np.testing.assert_array_equal(group.tree().boxes(0), table.boxes(0))
    assert group.tree().hash == table.hash


def test_a_tree_without_tiles(store):
    empty = build_quadtree(
        open_slide(np.zeros((77, 88, 3), np.uint8), mpp=0.5),
        TissueMask(np.zeros((9, 11), bool), (8.0, 8.0), 4.0, "brightfield"), mpp=0.5, tile_px=8, levels=2,
    )  # fmt: skip
    group = begin(store, empty)
    group.finish("empty")
    assert len(group.tree()) == 0
    with pytest.raises(BrokenBag, match="no tissue"):
        store.bag("case1/a.svs")


def test_few_files_a_slide(store, tmp_path):
    whole(store, tree())
    assert sum(len(files) for _, _, files in os.walk(tmp_path)) < 25


def test_chunks_of_zeros_are_written(store):
    table = tree()
    group = begin(store, table)
    zeros = np.zeros((len(table), 5), np.float16)
    write_features(group, "mine", zeros, np.zeros(len(table), bool))
    assert os.path.getsize(group.path / "features/mine/x/c/0/0") == len(table) * 5 * 2 + 4
    assert (group.path / "features/mine/valid/c/0").exists()
    assert group.features("mine").chunks_are_there()
    assert not group.features("mine").read()[0].any()
    black = np.zeros((9, 11, 3), np.uint8)
    group.write_tissue(TissueMask(np.zeros((9, 11), bool), (8.0, 8.0), 4.0, "x"), black, "h")
    np.testing.assert_array_equal(group.thumbnail(), black)


# --- damage ----------------------------------------------------------------------------------------------------------

CHUNKS = {
    "tissue/mask/c/0/0": "mask",
    "tissue/thumbnail/c/0/0/0": "thumbnail",
    "tiles/grid/c/0/0": "grid",
    "tiles/parent/c/0": "parent",
    "features/mine/x/c/1/0": "features/mine/x: chunk 1",
    "features/mine/valid/c/1": "features/mine/valid: chunk 1",
}


def read_all(group: SlideGroup) -> None:
    group.mask(), group.thumbnail(), group.tree(), group.features("mine").read()


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped", "longer"])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_damage_is_refused_and_named(store, monkeypatch, chunk, damage):
    monkeypatch.setattr(module, "CHUNK_ROWS", 16)
    group = whole(store, tree())
    read_all(group)
    path = group.path / chunk
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        data[len(data) // 2] ^= damage == "flipped"
        path.write_bytes({"empty": b"", "cut": data[:-3], "longer": bytes(data) + b"\0"}.get(damage, data))
    with pytest.raises(BrokenBag) as error:
        read_all(group)
    assert error.value.path == "case1/a.svs"
    if damage == "missing" or "features" in chunk:
        assert CHUNKS[chunk].split(":")[0] in error.value.reason


@pytest.mark.parametrize("at", [0, 100, -1, -5])
def test_every_byte_of_a_chunk_is_guarded(store, at):
    group = whole(store, tree())
    for chunk in ("features/mine/x/c/0/0", "features/mine/valid/c/0", "tissue/thumbnail/c/0/0/0"):
        path = group.path / chunk
        good = path.read_bytes()
        bad = bytearray(good)
        bad[min(at, len(bad) - 1)] ^= 0x10
        path.write_bytes(bad)
        with pytest.raises(BrokenBag):
            read_all(group)
        path.write_bytes(good)
    read_all(group)


def test_a_table_of_tiles_that_was_exchanged_is_refused(store):
    group = whole(store, tree())
    zarr.open_group(group.path)["tiles/xy"][0] = (999, 999)  # whole chunk, right checksum, other tiles
    with pytest.raises(BrokenBag, match="not the one that was written"):
        group.tree()


@pytest.mark.parametrize(
    "name", ["zarr.json", "tiles/zarr.json", "features/mine/zarr.json", "features/mine/x/zarr.json"]
)
def test_cut_metadata_is_refused(store, name):
    group = whole(store, tree())
    path = group.path / name
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(BrokenBag):
        store.bag("case1/a.svs", "mine")


def test_a_machine_at_fault_is_not_a_broken_bag(store, monkeypatch):
    group = whole(store, tree())

    def full(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(module.StoredArray, "open", full)
    with pytest.raises(OSError, match="Too many"):
        group.mask()


# --- what counts as whole --------------------------------------------------------------------------------------------


def test_status_along_the_way(store):
    table, group = tree(), store.group("case1/a.svs")
    assert group.status == "missing"
    with pytest.raises(BrokenBag, match="has not been processed"):
        store.bag("case1/a.svs")
    begin(store, table)
    assert group.status == "writing"
    with pytest.raises(BrokenBag, match="is not finished"):
        store.bag("case1/a.svs")
    write_features(group, "mine", *features_of(table))
    with pytest.raises(BrokenBag, match="is not finished"):
        store.bag("case1/a.svs")
    group.finish("complete")
    assert len(store.bag("case1/a.svs")) == len(table)


def test_features_that_are_being_written_are_not_read(store):
    table = tree()
    group = whole(store, table)
    other = group.features("other")
    other.begin(len(table), 5, "float16", a=1)
    other.write_chunk(0, *features_of(table))
    assert group.encoders() == ["mine"]
    with pytest.raises(BrokenBag, match="not finished"):
        other.read()
    with pytest.raises(BrokenBag, match="unknown encoder 'other'"):
        store.bag("case1/a.svs", "other")
    assert store.bag("case1/a.svs").dim == 5, "the finished ones stay usable"


def test_another_schema_is_not_ours(store):
    group = whole(store, tree())
    group.update(schema="somebody/else")
    assert group.status == "missing"


def test_begin_keeps_what_is_there_and_refreshes_the_facts(store):
    group = whole(store, tree())
    group.begin(slide={"path": "case1/a.svs", "new": 1})
    assert group.status == "writing"
    assert group.attrs["slide"]["new"] == 1
    assert group.attrs["hashes"]["tissue"] == "tissue hash"
    read_all(group)


def test_begin_anew_where_the_attributes_cannot_be_read(store):
    group = whole(store, tree())
    (group.path / "zarr.json").write_bytes(b"{")
    group = store.group("case1/a.svs")
    group.begin(slide={"path": "case1/a.svs"})
    assert group.attrs["hashes"] == {}
    assert not (group.path / "tiles").exists()


def test_halves_that_a_killed_writer_left_are_swept(store):
    group = whole(store, tree())
    parts = [group.path / "features/mine/x/c/0/0.abc.partial", group.path / "zarr.json.1.partial"]
    for part in parts:
        part.write_bytes(b"half")
    group.begin(slide={"path": "case1/a.svs"})
    assert not any(part.exists() for part in parts)
    read_all(group)


def test_new_tissue_or_tiles_drop_what_was_made_of_the_old(store):
    table = tree()
    group = whole(store, table)
    group.write_prediction("m", {"logits": np.ones(2)})
    group.write_tiles(tree(levels=1))
    assert sorted(os.listdir(group.path)) == ["tiles", "tissue", "zarr.json"]
    assert set(group.attrs["hashes"]) == {"tissue", "tiles"}
    group.write_tissue(mask(), thumbnail(), "new")
    assert sorted(os.listdir(group.path)) == ["tissue", "zarr.json"]
    assert group.attrs["hashes"] == {"tissue": "new"}


# --- killed at any moment ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


class Killer:
    """Stops the writer at its n-th change of the disk: before or after a file gets its name, or amid a deletion."""

    def __init__(self, patch: pytest.MonkeyPatch, n: int, moment: str) -> None:
        self.left, self.moment = n, moment
        self.rename, self.rmtree = os.replace, shutil.rmtree
        patch.setattr(places.os, "replace", self.replacing)
        patch.setattr(places.shutil, "rmtree", self.deleting)

    def is_time(self) -> bool:
        self.left -= 1
        return self.left == -1

    def replacing(self, source: str, target: str) -> None:
        now = self.is_time()
        if now and self.moment == "before":
            raise Killed
        self.rename(source, target)
        if now:
            raise Killed

    def deleting(self, path: Path, **options: bool) -> None:
        if path.exists() and self.is_time():
            for name in sorted(p for p in path.rglob("*") if p.is_file())[self.moment == "before" :: 2]:
                name.unlink()
            raise Killed
        self.rmtree(path, **options)


class Recipe:
    """A slide's line, as the stages go through it: what is stored already and still holds is kept."""

    def __init__(self, seed: int, levels: int = 2, tissue: int | None = None) -> None:
        tissue = seed if tissue is None else tissue
        self.tissue_hash = f"tissue {tissue}"
        self.mask = TissueMask(np.random.default_rng(tissue).random((9, 11)) > 0.3, (8.0, 8.5), 4.1, "x", ())
        self.tree = tree(levels=levels)
        rng = np.random.default_rng(seed)
        self.x = rng.normal(size=(len(self.tree), 5)).astype(np.float16)
        self.valid = rng.random(len(self.tree)) > 0.1
        self.facts = {"a": seed, "tiles": self.tree.hash}

    def prepare(self, group: SlideGroup) -> None:
        kept = group.attrs.get("hashes", {}).get("tissue") == self.tissue_hash and reads(group.mask, group.thumbnail)
        stands = kept and group.attrs["hashes"].get("tiles") == self.tree.hash and reads(group.tree)
        status = "complete" if stands and group.status == "complete" else "writing"
        group.begin(status, **FACTS, recipe=self.tissue_hash)
        if not kept:
            group.write_tissue(self.mask, thumbnail(), self.tissue_hash)
        if not stands:
            group.write_tiles(self.tree)

    def run(self, group: SlideGroup) -> None:
        self.prepare(group)
        features = group.features("mine")
        features.begin(len(self.x), 5, "float16", **self.facts)
        for chunk in np.unique(np.flatnonzero(features.missing_rows()) // module.CHUNK_ROWS):
            rows = slice(chunk * module.CHUNK_ROWS, (chunk + 1) * module.CHUNK_ROWS)
            features.write_chunk(int(chunk), self.x[rows], self.valid[rows])
        features.finish()
        group.finish("complete", counts={"tiles": [len(self.tree)], "invalid": 0})


def reads(*parts) -> bool:
    try:
        return all(part() is not None for part in parts)
    except BrokenBag:
        return False


def snapshot(group: SlideGroup) -> dict[str, object]:
    """Every file: its bytes, or what they mean where they are JSON, whose order means nothing."""
    found = {p.relative_to(group.path).as_posix(): p.read_bytes() for p in group.path.rglob("*") if p.is_file()}
    return {name: json.loads(data) if name.endswith(".json") else data for name, data in found.items()}


NEW, OLD = Recipe(1), Recipe(2, levels=1)
OTHER_FEATURES = Recipe(3, tissue=1)  # tissue and tiles stand: the group keeps saying complete


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(
    ("first", "killed", "then"),
    [
        (None, NEW, NEW),
        (OLD, NEW, NEW),
        (OLD, NEW, OLD),
        (NEW, OTHER_FEATURES, OTHER_FEATURES),
        (NEW, OTHER_FEATURES, NEW),
    ],
    ids=["fresh", "changed", "changed and back", "other features", "other features and back"],
)
def test_killed_at_any_moment(store, tmp_path_factory, monkeypatch, first, killed, then, moment):
    """No half is taken for a whole, and running again gives what a run without the kill gives."""
    monkeypatch.setattr(module, "CHUNK_ROWS", 50)
    group = BagStore(tmp_path_factory.mktemp("whole")).group("case1/a.svs")
    then.run(group)
    whole = snapshot(group)
    for n in itertools.count():
        group = store.group("case1/a.svs")
        shutil.rmtree(group.path, ignore_errors=True)
        if first:
            first.run(group)
        with monkeypatch.context() as patch:
            Killer(patch, n, moment)
            try:
                killed.run(group)
            except Killed:
                pass
            else:
                break
        for path in group.path.rglob("zarr.json"):
            json.loads(path.read_bytes())
        if group.status == "complete" and reads(group.features("mine").read):
            made = {r.facts["a"]: r for r in (first, killed) if r}[group.features("mine").attrs["a"]]
            for found, expected in zip(group.features("mine").read(), (made.x, made.valid), strict=True):
                np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(group.mask().image, made.mask.image)
        then.run(store.group("case1/a.svs"))
        assert snapshot(group) == whole, n
    assert n > 5, "moments were tried"


# --- features --------------------------------------------------------------------------------------------------------


@pytest.fixture
def seven(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ROWS", 7)


def test_missing_rows_are_those_of_missing_chunks(store, seven):
    table = tree()
    group = begin(store, table)
    x, valid = features_of(table)
    features = group.features("mine")
    features.begin(len(x), 5, "float16", a=1)
    chunks = -(-len(x) // 7)
    assert features.missing_rows().all()
    written = {0, 3, chunks - 1}
    for chunk in written:
        features.write_chunk(chunk, x[chunk * 7 : chunk * 7 + 7], valid[chunk * 7 : chunk * 7 + 7])
    again = store.group("case1/a.svs").features("mine")
    again.begin(len(x), 5, "float16", a=1)
    naive = [row // 7 not in written for row in range(len(x))]
    assert again.missing_rows().tolist() == naive
    assert again.stored_valid().tolist() == [bool(v) and not miss for v, miss in zip(valid, naive, strict=True)]
    assert not again.chunks_are_there()


@pytest.mark.parametrize("change", [{"a": 2}, {"rows": -1}, {"dim": 6}, {"dtype": "float32"}, {"b": 1}])
def test_features_of_anything_else_are_begun_anew(store, seven, change):
    table = tree()
    group = begin(store, table)
    x, valid = features_of(table)
    write_features(group, "mine", x, valid, a=1)
    group.write_prediction("m", {"logits": np.ones(2)})
    same = {"rows": len(x), "dim": 5, "dtype": "float16", "a": 1}
    features = group.features("mine")
    features.begin(**same)
    assert not features.missing_rows().any()
    assert (group.path / "predictions/m").exists()
    features.begin(**same | change | ({"rows": len(x) - 1} if "rows" in change else {}))
    assert features.missing_rows().all()
    assert not (group.path / "predictions/m").exists(), "made of features that are gone"


def test_features_in_chunks_of_another_size_are_begun_anew(store, monkeypatch):
    table = tree()
    group = begin(store, table)
    x, valid = features_of(table)
    write_features(group, "mine", x, valid, a=1)
    monkeypatch.setattr(module, "CHUNK_ROWS", 50)
    features = group.features("mine")
    features.begin(len(x), 5, "float16", a=1)
    assert features.missing_rows().all()


def test_a_chunk_is_written_whole_or_not_at_all(store, seven):
    group = begin(store, tree())
    features = group.features("mine")
    features.begin(10, 5, "float16")
    for chunk, rows in ((0, 6), (0, 8), (1, 7)):
        with pytest.raises(ValueError, match="whole"):
            features.write_chunk(chunk, np.zeros((rows, 5)), np.ones(rows, bool))
    features.write_chunk(1, np.zeros((3, 5)), np.ones(3, bool))
    assert features.missing_rows().tolist() == [True] * 7 + [False] * 3


def test_valid_is_written_before_x(store, monkeypatch):
    group = begin(store, tree())
    features = group.features("mine")
    features.begin(3, 5, "float16")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(features._x, "write_chunk", full)
    with pytest.raises(OSError, match="No space"):
        features.write_chunk(0, np.ones((3, 5)), np.ones(3, bool))
    assert (group.path / "features/mine/valid/c/0").exists()
    assert not (group.path / "features/mine/x/c/0/0").exists()


# --- which features --------------------------------------------------------------------------------------------------


@pytest.fixture
def many(store):
    group = begin(store, tree())
    for key in ("uni", "resnet50@0a1b2c3d", "resnet50@ffffffff", "timm--vit_s", "virchow@12345678"):
        write_features(group, key, *features_of(tree()))
    group.finish("complete")
    return group


@pytest.mark.parametrize(
    ("asked", "key"),
    [
        ("uni", "uni"),
        ("timm/vit_s", "timm--vit_s"),
        ("timm--vit_s", "timm--vit_s"),
        ("virchow", "virchow@12345678"),
        ("resnet50@ffffffff", "resnet50@ffffffff"),
    ],
)
def test_a_name_or_a_key_finds_the_features(many, asked, key):
    assert many.encoder_key(asked) == key


@pytest.mark.parametrize(
    ("asked", "words"),
    [("resnet50", "resnet50@0a1b2c3d, resnet50@ffffffff"), (None, "say which"), ("unu", "Did you mean 'uni'")],
)
def test_what_is_not_clear_is_asked(many, asked, words):
    with pytest.raises(BrokenBag, match=words):
        many.encoder_key(asked)


def test_the_standard_weights_win_where_they_are_there(many):
    write_features(many, "resnet50", *features_of(tree()))
    assert many.encoder_key("resnet50") == "resnet50"


def test_the_only_features_need_no_name(store):
    group = whole(store, tree(), key="mine@00000000")
    assert group.encoder_key(None) == group.encoder_key("mine") == "mine@00000000"
    with pytest.raises(BrokenBag, match="no complete features"):
        begin(store, tree(), "b.svs").encoder_key(None)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../a.svs", "a/../../b.svs", "/etc/a.svs", "", ".", "a/.."])
def test_names_that_lead_outside_are_refused(store, name):
    with pytest.raises(UsageError):
        store.group(name)


ODD = [
    "a::b.svs",
    "a b/c d.svs",
    "ü/β.svs",
    "s3:/b.svs",
    "a#b?c.svs",
    "%2e%2e.svs",
    "a.zarr.svs",
    "..a.svs",
    "x\ny.svs",
]


@pytest.mark.parametrize(
    "name", [*ODD, "x" * 251 + ".svs", "ü" * 125 + ".svs", b"caf\xe9.svs".decode("utf-8", "surrogateescape")]
)
def test_odd_names_are_kept(store, name):
    whole(store, tree(), name)
    assert store.slides() == [name]
    bag = store.bag(name)
    assert bag.slide == name
    assert len(os.fsencode(store.group(name).path.name)) <= 255


def test_long_names_that_differ_at_the_end_do_not_meet(store):
    a, b = "x" * 245 + "1.svs", "x" * 245 + "2.svs"
    assert group_path(a) != group_path(b)
    assert group_path("a.svs") == group_path("./a.svs")
    assert group_path("d/a.svs").as_posix() == "d/a.svs.zarr"
    assert short_name("n" * 235, ".zarr") == "n" * 235 + ".zarr"
    assert len(short_name("n" * 236, ".zarr")) < 200
    for name in ("ü" * 130, "€" * 90, "𝕏" * 70):
        assert len(short_name(name, ".png").encode()) <= 240, "cut between letters, and still valid UTF-8"


def test_two_slides_of_one_name_in_two_folders(store):
    whole(store, tree(), "case1/a.svs")
    whole(store, tree(levels=1), "case2/a.svs")
    begin(store, tree(), "b.svs")
    os.makedirs(store.root / "slides/junk.zarr")
    assert store.slides() == ["b.svs", "case1/a.svs", "case2/a.svs"]
    assert [len(store.bag(f"case{k}/a.svs").levels) for k in (1, 2)] == [2, 1]


def test_no_store_no_slides(tmp_path):
    assert BagStore(tmp_path / "nowhere").slides() == []
    assert read_attrs(tmp_path) == {}


# --- bags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encode_levels", ["all", "finest", (2.0,), (2.0, 0.5)])
def test_a_bag_has_what_was_written(store, encode_levels):
    table = tree(encode_levels, levels=3)
    x, valid = features_of(table)
    whole(store, table)
    bag = store.bag("case1/a.svs", "mine")
    at = 0
    assert len(bag.levels) == 3
    for k, (level, node) in enumerate(zip(bag.levels, table.levels, strict=True)):
        n = node.stop - node.start
        assert (level.mpp, level.tile_px, level.span_px) == (node.mpp, 8, node.span_px)
        for name in ("grid", "xy", "tissue", "parent"):
            np.testing.assert_array_equal(getattr(level, name).numpy(), getattr(node, name))
        if k in table.encoded_levels:
            np.testing.assert_array_equal(level.features.numpy(), x[at : at + n])
            np.testing.assert_array_equal(level.valid.numpy(), valid[at : at + n])
            at += n
        else:
            assert level.features is None
            assert not level.valid.any()
    assert at == len(x)


def test_predictions_round_trip(store):
    group = whole(store, tree())
    arrays = {"logits": RNG.normal(size=3), "weight": np.array([0.5, np.nan, 0.5], np.float32), "none": np.zeros(0)}
    group.write_prediction("m", arrays, classes=["a", "b", "c"], levels=[1])
    found = group.prediction("m")
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    assert read_attrs(group.path / "predictions/m") == {"classes": ["a", "b", "c"], "levels": [1], "status": "complete"}
    group.write_prediction("m", {"logits": np.zeros(1)})
    assert list(group.prediction("m")) == ["logits"], "an old prediction leaves nothing behind"


def test_a_prediction_that_is_not_finished_is_none(store):
    group = whole(store, tree())
    with pytest.raises(BrokenBag, match="no prediction of the model 'm'"):
        group.prediction("m")
    group.write_prediction("m", {"logits": np.ones(2)})
    (group.path / "predictions/m/logits/c/0").unlink()
    with pytest.raises(BrokenBag, match="chunk 0 is missing"):
        group.prediction("m")
    (group.path / "predictions/m/zarr.json").unlink()
    with pytest.raises(BrokenBag, match="no prediction"):
        group.prediction("m")

"""Features that other tools made: their layouts, their places on the grid, and what is wrong with files named."""

import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import pipeline
from pipeline.bags import Store
from pipeline.cohort import place_of
from pipeline.errors import BrokenBag, UsageError
from pipeline.featurefiles import FeatureFiles
from pipeline.training import train

DIM = 4
CELLS = np.array([[0, 0], [1, 0], [2, 0], [1, 1], [3, 2], [2, 1]])


def numbers(seed: int = 0, n: int = len(CELLS)) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, DIM)).astype(np.float32)


def h5(path: Path, attrs=None, on=None, **arrays):
    """`attrs` go to the data set `on`, or to the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values
        (file if on is None else file[on]).attrs.update(attrs or {})
    return path


def one(folder) -> FeatureFiles:
    files = FeatureFiles(folder)
    return files.features(files.slides(), None)


def bag_of(folder, slide="a"):
    return one(folder).bag(slide)


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_trident(tmp_path):
    attrs = {"patch_size": 256, "patch_size_level0": 512, "overlap": 0}
    h5(tmp_path / "a.h5", attrs, "coords", features=numbers(), coords=CELLS * 512 + [1000, 7])
    bag = bag_of(tmp_path)
    assert torch.equal(bag.features, torch.from_numpy(numbers()))
    assert bag.grid.tolist() == CELLS.tolist()


def test_trident_tiles_that_overlap_stand_on_cells_of_their_own(tmp_path):
    attrs = {"patch_size": 256, "patch_size_level0": 512, "overlap": 128}
    h5(tmp_path / "a.h5", attrs, "coords", features=numbers(), coords=CELLS * 256)
    assert bag_of(tmp_path).grid.tolist() == CELLS.tolist()


@pytest.mark.parametrize("attrs", [{"patch_size_level0": 512}, {}])
def test_tiles_on_a_diagonal(tmp_path, attrs):
    """No two in a row: a known edge says how far apart they are."""
    h5(tmp_path / "a.h5", attrs, "coords", features=numbers(0, 3), coords=np.arange(3)[:, None] * [1024, 1024])
    grid = bag_of(tmp_path).grid
    assert grid.tolist() == ([[0, 0], [2, 2], [4, 4]] if attrs else [[0, 0], [1024, 1024], [2048, 2048]])


def test_a_batch_of_one_slide(tmp_path):
    h5(tmp_path / "a.h5", features=numbers()[None], coords=(CELLS * 256)[None])
    bag = bag_of(tmp_path)
    assert len(bag) == len(CELLS)
    assert bag.grid.tolist() == CELLS.tolist()


def test_clam(tmp_path):
    """Two folders, one slide: the .h5 has the coordinates, and they have no attributes."""
    h5(tmp_path / "h5_files/a.h5", features=numbers(), coords=CELLS * 256)
    (tmp_path / "pt_files").mkdir()
    torch.save(torch.zeros(9, DIM), tmp_path / "pt_files/a.pt")
    torch.save(torch.ones(2, DIM), tmp_path / "pt_files/b.pt")
    files = one(tmp_path)
    assert files.slides() == ["a", "b"]
    assert files.bag("a").grid.tolist() == CELLS.tolist()
    assert torch.equal(files.bag("b").features, torch.ones(2, DIM))


def test_clam_in_pixels_of_a_level(tmp_path):
    """patch_size is of the patch's level; that tiles stand 4 × 256 apart in level 0 is seen."""
    attrs = {"patch_size": 256, "downsample": np.array([4.0, 4.0]), "patch_level": 1}
    h5(tmp_path / "a.h5", attrs, "coords", features=numbers(), coords=CELLS * 1024)
    assert bag_of(tmp_path).grid.tolist() == CELLS.tolist()


@pytest.mark.parametrize("offset", [(1, 1), (100, 37), (255, 128)])
def test_contours_that_are_not_on_one_grid(tmp_path, offset):
    """Each contour of CLAM's starts where it likes; its own tiles stay neighbours, the other's stay away."""
    second = CELLS * 256 + [256 * 20 + offset[0], offset[1]]
    h5(tmp_path / "a.h5", features=numbers(0, 12), coords=np.concatenate([CELLS * 256, second]))
    grid = bag_of(tmp_path).grid
    assert grid[:6].tolist() == CELLS.tolist()
    assert (grid[6:] - grid[6:].amin(0)).tolist() == CELLS.tolist()
    assert (grid[6:, 0] >= 19).all()


@pytest.mark.parametrize("unit", [1.0, 0.2508])
def test_stamp(tmp_path, unit):
    """µm, with and without the edge of a tile."""
    coords = CELLS * 256.0 * unit
    h5(tmp_path / "a.h5", {"tile_size_um": 256 * unit, "unit": "um"}, feats=numbers().astype(np.float16), coords=coords)
    h5(tmp_path / "b.h5", feats=numbers(), coords=coords)
    files = one(tmp_path)
    assert files.bag("a").grid.tolist() == files.bag("b").grid.tolist() == CELLS.tolist()
    assert torch.equal(files.bag("a").features, torch.from_numpy(numbers().astype(np.float16)).float())


@pytest.mark.parametrize(
    ("held", "grid"),
    [
        (torch.from_numpy(numbers()), None),
        (torch.from_numpy(numbers())[None], None),
        (torch.nn.Parameter(torch.from_numpy(numbers())), None),
        ({"features": torch.from_numpy(numbers()).double()}, None),
        ({"feats": torch.from_numpy(numbers()), "coords": torch.from_numpy(CELLS * 224)}, CELLS),
    ],
)
def test_pt(tmp_path, held, grid):
    torch.save(held, tmp_path / "a.pt")
    bag = bag_of(tmp_path)
    assert torch.equal(bag.features, torch.from_numpy(numbers()))
    assert bag.levels[0].grid is None if grid is None else bag.grid.tolist() == grid.tolist()


def test_bfloat16_in_a_pt(tmp_path):
    torch.save(torch.from_numpy(numbers()).bfloat16(), tmp_path / "a.pt")
    torch.testing.assert_close(bag_of(tmp_path).features, torch.from_numpy(numbers()), rtol=0.01, atol=0.01)


def test_npy_of_any_number(tmp_path):
    for i, kind in enumerate((np.float16, np.float32, np.float64, np.int32)):
        np.save(tmp_path / f"{i}.npy", (numbers() * 10).astype(kind))
    files = one(tmp_path)
    assert torch.equal(files.bag("2").features, torch.from_numpy((numbers() * 10).astype(np.float64)).float())
    assert torch.equal(files.bag("3").features, torch.from_numpy((numbers() * 10).astype(np.int32)).float())


def test_slides_go_by_their_path_without_the_ending(tmp_path):
    for name in ("TCGA-1.07AE0E16", "x/b", "models/abmil/weights"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / f"{name}.npy", numbers())
    files = FeatureFiles(tmp_path)
    assert files.slides() == ["TCGA-1.07AE0E16", "x/b"]
    assert files.has_features("x/b")
    assert not files.has_features("b")


def test_what_a_folder_is_seen_from_what_is_in_it(tmp_path):
    assert isinstance(place_of(tmp_path), Store)
    np.save(tmp_path / "a.npy", numbers())
    assert isinstance(place_of(tmp_path), FeatureFiles)
    (tmp_path / "run.json").write_text("{}")
    assert isinstance(place_of(tmp_path), Store)


def test_the_state_of_a_file_is_its_content(tmp_path):
    np.save(tmp_path / "a.npy", numbers(0))
    np.save(tmp_path / "b.npy", numbers(0))
    files = FeatureFiles(tmp_path)
    before = files.state("a")
    assert before == files.state("b")
    np.save(tmp_path / "a.npy", numbers(1))
    assert files.state("a") != before


# --- what is wrong with them -----------------------------------------------------------------------------------------


def spoil(name, write):
    def at(folder):
        write(folder / name)

    return at


def cut(path):
    h5(path, features=numbers(0, 500), coords=np.zeros((500, 2), int))
    path.write_bytes(path.read_bytes()[:4000])


def cut_pt(path):
    torch.save(torch.zeros(500, DIM), path)
    path.write_bytes(path.read_bytes()[:4000])


def short_npy(path):
    np.save(path, numbers(0, 500))
    path.write_bytes(path.read_bytes()[:4000])


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


BAD = [
    (spoil("bad.h5", cut), "truncated"),
    (spoil("bad.h5", lambda p: p.write_bytes(b"")), "open"),
    (spoil("bad.h5", lambda p: p.write_text("<html>")), "open"),
    (spoil("bad.h5", lambda p: h5(p, coords=CELLS)), "it has no features or feats; there are coords"),
    (spoil("bad.h5", lambda p: h5(p)), "it has no features or feats; there are none"),
    (spoil("bad.h5", lambda p: h5(p, features=numbers()[0])), r"of shape \(4,\), not \(tiles, features\)"),
    (spoil("bad.h5", lambda p: h5(p, features=numbers()[None, None])), r"shape \(1, 1, 6, 4\)"),
    (spoil("bad.h5", lambda p: h5(p, features=numbers()[:, :3])), "has 3 features a tile, the first slide 4"),
    (spoil("bad.h5", lambda p: h5(p, features=numbers(), coords=CELLS[:4])), "grid .* 4"),
    (spoil("bad.h5", lambda p: h5(p, features=numbers()[:0], coords=CELLS[:0])), "no tile"),
    (spoil("bad.h5", lambda p: h5(p, features=numbers(), coords=CELLS * np.nan)), "coordinates that are not finite"),
    (spoil("bad.npy", short_npy), "bad: train: "),
    (spoil("bad.npy", lambda p: np.save(p, numbers() * np.nan)), "not finite, the first in row 0"),
    (spoil("bad.npy", lambda p: np.save(p, numbers()[:0])), "no tile at all"),
    (spoil("bad.npy", lambda p: np.save(p, np.array([{"a": 1}], object))), "allow_pickle"),
    (spoil("bad.pt", cut_pt), "bad: train: "),
    (spoil("bad.pt", lambda p: torch.save({"weights": torch.zeros(1)}, p)), "no features or feats; there are weights"),
    (spoil("bad.pt", lambda p: torch.save({"features": "text"}, p)), "bad: train: "),
]


@pytest.mark.parametrize(("at", "words"), BAD)
def test_a_file_that_cannot_be_used_is_named(tmp_path, at, words):
    np.save(tmp_path / "a.npy", numbers())
    at(tmp_path)
    files = one(tmp_path)
    with pytest.raises(BrokenBag, match=rf"^bad: train: .*{words}" if not words.startswith("bad") else words):
        files.bag("bad")
    assert files.bag("a").dim == DIM


@pytest.mark.parametrize("plain", [False, True])
def test_a_pickle_in_a_pt_is_not_run(tmp_path, plain):
    marker, path = tmp_path / "was here", tmp_path / "bad.pt"
    path.write_bytes(pickle.dumps(Evil(marker))) if plain else torch.save({"features": Evil(marker)}, path)
    with pytest.raises(UsageError, match=r"bad: train: it is damaged, or holds more than tensors and was not run"):
        one(tmp_path)
    assert not marker.exists()
    pickle.loads(path.read_bytes()) if plain else torch.load(path, weights_only=False)
    assert marker.exists(), "it would have run"


def test_an_encoder_cannot_be_chosen(tmp_path):
    np.save(tmp_path / "a.npy", numbers())
    with pytest.raises(UsageError, match=r"--encoder uni: .* do not say whose they are"):
        FeatureFiles(tmp_path).features(["a"], "uni")


REAL = Path(pipeline.__file__).parents[2] / "shared/data/features"


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("123.tiles.h5", "it has no features or feats; there are x1_y1"),
        ("TCGA-2Y-A9GW-01Z-00-DX1.71805205-933D-4D72-A4A2-586DC5490D76.h5", "there are coords"),
        ("prov_normal_000_1.pt", r"features of shape \(1536,\), not \(tiles, features\)"),
        ("TCGA-AD-6964-01Z-00-DX1/features.h5", None),
    ],
)
def test_real_files(tmp_path, file, words):
    if not (REAL / file).is_file():
        pytest.skip(f"there is no {REAL / file}")
    (tmp_path / f"a{Path(file).suffix}").symlink_to(REAL / file)
    if words is not None:
        with pytest.raises(UsageError, match=f"^a: train: .*{words}"):
            one(tmp_path)
        return
    bag = bag_of(tmp_path)
    assert (len(bag), bag.dim) == (777, 512)
    with h5py.File(REAL / file) as there:
        coords = there["coords"][()]
    assert bag.grid.tolist() == ((coords - coords.min(0)) // 512).tolist()


# --- training on them ------------------------------------------------------------------------------------------------


def folder_of(place: Path, write) -> Path:
    """12 slides, every other one shifted; `write(path without ending, features, coords)`."""
    place.mkdir()
    rows = ["slide,label"]
    for i in range(12):
        n = 6 + i % 3
        cells = np.stack([np.arange(n) % 3, np.arange(n) // 3], axis=1)
        write(place / f"s{i:02}", numbers(i, n) + 1.5 * (i % 2), cells * 256)
        rows.append(f"s{i:02}.svs,{'pos' if i % 2 else 'neg'}")
    (place / "labels.csv").write_text("\n".join(rows) + "\n")
    return place


def as_npy(path, features, coords):
    np.save(path.with_suffix(".npy"), features)


def as_h5(path, features, coords):
    h5(path.with_suffix(".h5"), features=features, coords=coords)


def test_the_same_features_train_to_the_same_bytes_whatever_holds_them(tmp_path):
    made = []
    for write in (as_npy, as_h5):
        place = folder_of(tmp_path / write.__name__, write)
        trained = train(place, place / "labels.csv", head="abmil", epochs=2, hidden=6, attention=3)
        assert trained.folder == place / "models/abmil"
        assert trained.warnings == ()
        made.append((trained.folder / "model.safetensors").read_bytes())
    assert made[0] == made[1]


def test_a_head_with_places_trains_where_there_are_places(tmp_path):
    options = {"head": "longmil", "epochs": 1, "width": 8, "heads": 2}
    place = folder_of(tmp_path / "with", as_h5)
    assert np.isfinite(train(place, place / "labels.csv", **options).metrics["val"]["auc"])
    place = folder_of(tmp_path / "without", as_npy)
    with pytest.raises(UsageError, match=r"longmil: bag 's0.' has no grid"):
        train(place, place / "labels.csv", **options)
    assert not (place / "models").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head": "hagmil", "levels": 2}, "needs 2 levels"),
        ({"level": 0.5}, "--level 0.5: these features do not say of which"),
        ({"split_by": "tiles"}, "s05: train: "),
        ({"cv": 2}, "s05: train: "),
    ],
)
def test_what_files_cannot_give_is_said(tmp_path, options, words):
    place = folder_of(tmp_path / "with", as_npy)
    if "s05" in words:
        (place / "s05.npy").write_bytes(b"")
    with pytest.raises(UsageError, match=words):
        train(place, place / "labels.csv", epochs=1, **options)

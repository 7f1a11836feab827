"""Tissue segmentation against slides whose tissue is known, because we drew it, and against real ones."""

from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_fill_holes, label
from scipy.signal import find_peaks
from skimage.color import hed2rgb, rgb2hed
from skimage.data import immunohistochemistry
from skimage.filters import apply_hysteresis_threshold, threshold_otsu
from skimage.morphology import disk

from pipeline import tissue
from pipeline.area import GREY
from pipeline.readers import open_slide
from pipeline.slide import thumbnail
from pipeline.tissue import TissueConfig, TissueMask, find_tissue, segment

DATA = Path(__file__).parents[3] / "shared" / "data"
SIZE = (421, 563)  # 3.4 x 4.5 mm at 8 um/px; primes, so that a swapped axis cannot pass
INKS = {"blue": (35, 60, 165), "green": (25, 125, 75), "black": (38, 36, 42), "red": (215, 30, 45)}


@cache
def texture(stain: str) -> np.ndarray:
    """Real IHC texture, recoloured in optical density, as an endless sheet of the size of the slide; (h, w, 3) OD."""
    ihc = cv2.resize(immunohistochemistry(), (256, 256), interpolation=cv2.INTER_AREA)
    h, _, d = np.moveaxis(np.clip(rgb2hed(ihc), 0, None), 2, 0)
    zero = np.zeros_like(h)
    rgb = {
        "ihc": ihc / 255,
        "h&e": hed2rgb(np.dstack([h * 1.2, d * 1.5 + 0.03, zero])),
        "haematoxylin": hed2rgb(np.dstack([h * 2 + 0.15, d * 0.5, zero])),
        "eosin": hed2rgb(np.dstack([zero, d * 2 + h + 0.08, zero])),
    }
    rgb["grey"] = np.repeat(rgb["h&e"].mean(axis=2, keepdims=True), 3, axis=2)
    if stain == "blood":
        clot = 1 + 0.35 * (d - d.mean()) / d.std()
        od = clot[..., None] * -np.log10(np.array([168, 38, 52]) / 245)
    else:
        od = -np.log10(np.clip(rgb["h&e" if stain == "pale" else stain], 0.02, 1))
    if stain == "pale":
        od *= 0.08 / od.mean()
    od = np.clip(od, 0, None)
    sheet = np.vstack([np.hstack([od, od[:, ::-1]]), np.hstack([od[::-1], od[::-1, ::-1]])])
    return np.tile(sheet, (1, 2, 1))[: SIZE[0], : SIZE[1]]


def glass(colour: tuple[int, int, int] = (244, 243, 243), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(colour, 2.5, (*SIZE, 3))


def shape(seed: int = 1) -> np.ndarray:
    """Two pieces with rough edges."""
    rough = cv2.GaussianBlur(np.random.default_rng(seed).normal(0, 1, SIZE), (0, 0), 9)
    canvas = np.zeros(SIZE)
    cv2.ellipse(canvas, (200, 200), (110, 150), 20, 0, 360, 1.0, -1)
    cv2.ellipse(canvas, (440, 230), (50, 110), -15, 0, 360, 1.0, -1)
    return cv2.GaussianBlur(canvas, (0, 0), 9) + 2 * rough > 0.5


def stained(stain: str, where: np.ndarray, colour: tuple[int, int, int] = (244, 243, 243)) -> np.ndarray:
    soft = cv2.GaussianBlur(where.astype(float), (0, 0), 0.7)[..., None]
    return glass(colour) * 10 ** (-texture(stain) * soft)


def pen(image: np.ndarray, ink: str, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """An outline, a line across the tissue and a filled blob, the ink laid on unevenly; and where it is."""
    canvas = np.zeros(SIZE, np.uint8)
    cv2.ellipse(canvas, (200, 200), (165, 190), 10, 0, 300, 255, 14, cv2.LINE_AA)
    cv2.line(canvas, (150, 160), (550, 90), 255, 9, cv2.LINE_AA)
    cv2.circle(canvas, (500, 380), 25, 255, -1, cv2.LINE_AA)
    flow = cv2.GaussianBlur(np.random.default_rng(seed).normal(0, 1, SIZE), (0, 0), 6)
    opacity = (canvas / 255 * np.clip(0.9 + 0.8 * flow, 0.7, 1))[..., None]
    return image * (1 - opacity) + np.array(INKS[ink]) * opacity, canvas > 0


def as_photo(image: np.ndarray, quality: int = 80) -> np.ndarray:
    """uint8, through JPEG."""
    pixels = np.clip(image, 0, 255).round().astype(np.uint8)
    _, code = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(code, cv2.IMREAD_COLOR)[..., ::-1]


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


STAINS = ["h&e", "ihc", "haematoxylin", "eosin", "blood", "grey"]
GLASS = {
    "clear": (244, 243, 243),
    "grey-pink": (222, 214, 224),
    "yellowish": (240, 236, 214),
    "saturated": (255, 255, 255),
}
NOTHING = np.zeros(SIZE, bool)


@pytest.mark.parametrize("colour", GLASS)
@pytest.mark.parametrize("stain", STAINS)
def test_stained_tissue(stain: str, colour: str) -> None:
    mask, method, warnings = segment(as_photo(stained(stain, shape(), GLASS[colour])), 8.0)
    assert (method, warnings) == ("brightfield", ())
    assert dice(mask, shape()) >= 0.9


@pytest.mark.parametrize("quality", [30, 80])
@pytest.mark.parametrize("colour", GLASS)
def test_pale_tissue(colour: str, quality: int) -> None:
    mask, _, _ = segment(as_photo(stained("pale", shape(), GLASS[colour]), quality), 8.0)
    assert dice(mask, shape()) >= 0.9


def test_pale_and_dark_pieces_on_one_slide() -> None:
    image = stained("h&e", shape())
    image[:, 360:] = stained("pale", shape())[:, 360:]
    mask, _, _ = segment(as_photo(image), 8.0)
    assert dice(mask[:, 360:], shape()[:, 360:]) >= 0.9


@pytest.mark.parametrize("brown", [(70, 50, 45), (105, 70, 50)])
def test_even_dark_dab_is_not_black_ink(brown: tuple[int, int, int]) -> None:
    depth = (1 + 0.08 * np.random.default_rng(4).normal(0, 1, SIZE)) * shape()
    image = glass() * 10 ** (np.log10(np.array(brown) / 244) * depth[..., None])
    assert dice(segment(as_photo(image), 8.0)[0], shape()) >= 0.9


@pytest.mark.parametrize("colour", [*GLASS.values(), (205, 205, 205)])
def test_glass_is_not_tissue(colour: tuple[int, int, int]) -> None:
    assert not segment(as_photo(glass(colour)), 8.0)[0].any()


def test_noisy_and_badly_compressed_glass_is_not_tissue() -> None:
    noise = np.random.default_rng(1).normal((236, 232, 238), 6, (*SIZE, 3))
    assert not segment(as_photo(noise, 30), 8.0)[0].any()


@pytest.mark.parametrize("piece", [shape(), NOTHING], ids=["tissue", "glass"])
def test_vignetting(piece: np.ndarray) -> None:
    y, x = np.mgrid[-1 : 1 : SIZE[0] * 1j, -1 : 1 : SIZE[1] * 1j]
    mask, _, _ = segment(as_photo(stained("pale", piece) * (1 - 0.1 * (x**2 + y**2))[..., None]), 8.0)
    assert dice(mask, piece) >= 0.9 if piece.any() else not mask.any()


@pytest.mark.parametrize("ink", INKS)
def test_pen_alone_is_not_tissue(ink: str) -> None:
    image, _ = pen(glass(), ink)
    mask, _, warnings = segment(as_photo(image), 8.0)
    assert mask.mean() < 0.005
    assert len(warnings) == 1
    assert warnings[0].startswith("pen marks removed (1")  # 12 % of the thumbnail


@pytest.mark.parametrize("ink", INKS)
@pytest.mark.parametrize("stain", ["h&e", "ihc", "haematoxylin", "eosin", "blood", "pale"])
def test_pen_beside_and_across_tissue(stain: str, ink: str) -> None:
    image, drawn = pen(stained(stain, shape()), ink)
    mask, _, _ = segment(as_photo(image), 8.0)
    around = cv2.dilate(drawn.astype(np.uint8), np.ones((7, 7))) > 0
    assert dice(mask & ~around, shape() & ~around) >= 0.9
    assert mask[drawn & ~shape()].mean() < 0.1


def test_pen_is_kept_on_demand() -> None:
    image, drawn = pen(glass(), "blue")
    assert segment(as_photo(image), 8.0, TissueConfig(remove_pen=False))[0][drawn].mean() > 0.9


@pytest.mark.parametrize("stain", ["h&e", "pale"])
@pytest.mark.parametrize("margin", [60, 110])
def test_black_borders_are_no_tissue(stain: str, margin: int) -> None:
    """At 110 px the larger part of the image is black, and still it is no fluorescence."""
    inside = np.zeros(SIZE, bool)
    inside[margin:-margin, 2 * margin : -margin] = True
    mask, method, _ = segment(as_photo(stained(stain, shape()) * inside[..., None]), 8.0)
    assert method == "brightfield"
    assert dice(mask, shape() & inside) >= 0.9


def test_white_filling_is_not_taken_for_the_glass() -> None:
    """Transparent or unscanned parts arrive pure white; beside them tinted glass would look stained."""
    inside = np.zeros(SIZE, bool)
    inside[100:, 130:400] = True
    image = np.where(inside[..., None], stained("pale", shape(), GLASS["grey-pink"]), 255).round().astype(np.uint8)
    assert dice(segment(image, 8.0)[0], shape() & inside) >= 0.9


@pytest.mark.parametrize("level", [0, 5])
def test_black_is_no_tissue(level: int) -> None:
    assert not segment(as_photo(np.random.default_rng(0).normal(level, 2, (*SIZE, 3))), 8.0)[0].any()


@pytest.mark.parametrize("stain", ["h&e", "haematoxylin", "eosin", "blood"])
def test_tissue_without_any_background(stain: str) -> None:
    mask, method, _ = segment(as_photo(stained(stain, ~NOTHING)), 8.0)
    assert method == "brightfield"
    assert mask.all()


@pytest.mark.parametrize("gain", [40, 120, 255])
def test_fluorescence(gain: int) -> None:
    signal = texture("haematoxylin").mean(axis=2) * shape()
    dark = np.random.default_rng(0).normal(5, 2, (*SIZE, 3))
    mask, method, _ = segment(as_photo(dark + gain * (signal / signal.max())[..., None] * (0.1, 0.3, 1)), 8.0)
    assert method == "fluorescence"
    assert dice(mask, shape()) >= 0.9


def test_dark_without_signal_is_no_tissue() -> None:
    assert not segment(as_photo(np.random.default_rng(0).normal(15, 3, (*SIZE, 3))), 8.0)[0].any()


def test_debris_goes_and_holes_are_filled_by_size() -> None:
    where = np.zeros(SIZE, np.uint8)
    cv2.circle(where, (150, 200), 100, 1, -1)
    for centre, radius, inside in ((100, 200), 12, 0), ((190, 200), 25, 0), ((350, 100), 5, 1), ((450, 300), 15, 1):
        cv2.circle(where, centre, radius, inside, -1)
    mask, _, _ = segment(as_photo(stained("eosin", where > 0)), 8.0)  # 16,000 um2: radius 9 px; 50,000 um2: 16 px
    assert (mask[200, 100], mask[200, 190], mask[100, 350], mask[300, 450]) == (True, False, False, True)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2), (16, 16), (5, 211)])
def test_tiny_images(size: tuple[int, int]) -> None:
    assert segment(np.full((*size, 3), (170, 120, 180), np.uint8), 8.0)[0].all()
    for nothing in (0, 244, (253, 255, 255), 255):
        assert not segment(np.full((*size, 3), nothing, np.uint8), 8.0)[0].any()


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), height=st.integers(1, 40), width=st.integers(1, 40), mpp=st.floats(0.05, 64))
def test_any_image_has_a_mask(seed: int, height: int, width: int, mpp: float) -> None:
    rng = np.random.default_rng(seed)
    rgb = (
        rng.normal(rng.uniform(0, 255, 3), rng.choice([0, 1, 20, 90]), (height, width, 3)).clip(0, 255).astype(np.uint8)
    )
    mask, _, _ = segment(rgb, mpp, unreadable=rng.random((height, width)) < rng.choice([0, 0.5]))
    assert (mask.shape, mask.dtype) == ((height, width), bool)


def test_unreadable_parts() -> None:
    """Tissue where they touch tissue, or are large; glass where they lie in glass; and never a part of a threshold."""
    unreadable = NOTHING.copy()
    unreadable[190:222, 180:212] = unreadable[370:402, 400:432] = True
    image = as_photo(stained("pale", shape()))
    image[unreadable] = (255, 0, 255)
    mask, _, warnings = segment(image, 8.0, unreadable=unreadable)
    assert mask[190:222, 180:212].all()
    assert not mask[370:402, 400:432].any()
    assert warnings == ("unreadable areas counted as tissue (0.4% of the thumbnail)",)
    image[unreadable] = 0
    assert np.array_equal(segment(image, 8.0, unreadable=unreadable)[0], mask)
    unreadable[250:400, 20:200] = True
    assert segment(image, 8.0, unreadable=unreadable)[0][250:400, 20:200].all()
    assert segment(image, 8.0, unreadable=~NOTHING)[0].all()


@pytest.mark.parametrize(
    ("size", "factor"),
    [((256, 128), 1.0), ((300, 180), 6.0), ((1013, 701), 15.7), ((700, 90), 2.5), ((4, 6), 2.4), ((40, 707), 2.02)],
    ids=["pixels as they are", "whole cells", "cut pixels", "halves", "2 x 3 pixels a cell", "cut in y alone"],
)
def test_a_thumbnail_is_the_rounded_mean(address, area_mean, size: tuple[int, int], factor: float) -> None:
    pixels = address(*size)
    view = thumbnail(open_slide(pixels, mpp=0.5), 0.5 * factor, min_px=1)
    exact = area_mean(pixels, (0, 0, *size), view.rgb.shape[1::-1])
    assert np.abs(view.rgb - exact).max() <= 0.5 + 0.5 / GREY + 1e-4  # the means are in 1/256 of a grey level
    assert view.rgb.shape[:2] == tuple(round(side / factor) for side in size[::-1])


def test_the_same_image_gives_the_same_mask() -> None:
    image, _ = pen(stained("h&e", shape()), "green")
    first, again = (segment(as_photo(image), 8.0) for _ in range(2))
    assert np.array_equal(first[0], again[0])
    assert first[1:] == again[1:]


@pytest.mark.parametrize("band_px", [1, 5000])
@pytest.mark.parametrize("kind", ["stained", "fluorescent"])
def test_what_is_done_in_bands_does_not_show(monkeypatch: pytest.MonkeyPatch, kind: str, band_px: int) -> None:
    if kind == "stained":
        image = as_photo(pen(stained("h&e", shape()), "green")[0])
        image[:30] = 0
    else:
        image = as_photo(np.random.default_rng(0).normal(5, 2, (*SIZE, 3)) + 40 * shape()[..., None])
    want = segment(image, 8.0)
    monkeypatch.setattr(tissue, "BAND_PX", band_px)
    got = segment(image, 8.0)
    assert np.array_equal(got[0], want[0])
    assert got[1:] == want[1:]


def rough(seed: int) -> np.ndarray:
    """(h, w) float32 in 0..1 of any small size, as islands or as noise."""
    rng = np.random.default_rng(seed)
    image = rng.random(rng.integers(1, 40, 2), np.float32)
    return cv2.GaussianBlur(image, (0, 0), 1.5) if seed % 2 else image


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), low=st.sampled_from([0.1, 0.4, 0.5]), step=st.sampled_from([0.0, 0.03, 0.3]))
def test_hysteresis_is_that_of_skimage(seed: int, low: float, step: float) -> None:
    image = rough(seed)
    image.ravel()[::7] = low  # as float32, which is more than 0.1 and less than 0.4
    want = apply_hysteresis_threshold(image, low, np.float64(low + step))
    assert np.array_equal(tissue._hysteresis(image, low, low + step), want)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), unit=st.sampled_from([1, 0.01]), span=st.sampled_from([0, 1, 3, 40, 300]))
def test_otsu_is_that_of_skimage(seed: int, unit: float, span: float) -> None:
    values = (rough(seed) * span + 2) * np.float32(unit)
    where = np.random.default_rng(seed).random(values.shape) < 0.7
    whole = np.clip(values[where] / unit, 0, 255).astype(np.uint8)
    assert tissue._otsu(values, where, unit) == (threshold_otsu(whole) * unit if whole.size else 0)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.2, 0.9), least=st.integers(0, 30))
def test_holes_and_small_regions_are_those_of_scipy(seed: int, share: float, least: int) -> None:
    mask = rough(seed) < share
    assert np.array_equal(tissue._holes(mask), binary_fill_holes(mask) & ~mask)
    regions, _ = label(mask, np.ones((3, 3)))
    large = np.bincount(regions.ravel()) >= least
    assert np.array_equal(tissue._drop_small(mask, least), mask & large[regions])


@settings(max_examples=200, deadline=None)
@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=30), height=st.integers(0, 4))
def test_the_last_peak_is_that_of_scipy(counts: list[int], height: int) -> None:
    peaks = find_peaks(counts, height=height)[0]
    if len(peaks):
        assert tissue._last_peak(np.array(counts), height) == peaks[-1]


@given(values=st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_the_median_of_counts_is_that_of_the_values(values: list[int]) -> None:
    row = np.array([[*values, 7, 9]], np.uint8)
    where = np.array([[True] * len(values) + [False] * 2])
    assert tissue._median(tissue._count(row, where)) == np.median(values)


def test_disks_are_those_of_skimage() -> None:
    assert all(np.array_equal(tissue._disk(radius), disk(radius)) for radius in range(17))


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6), dark=st.sampled_from([0.0, 0.2, 0.25, 0.3, 0.6]), light=st.sampled_from([11, 70, 90])
)
def test_fluorescence_is_told_by_a_quarter_and_a_median(seed: int, dark: float, light: int) -> None:
    rng = np.random.default_rng(seed)
    rgb = rng.integers(0, light + 1, (*rng.integers(1, 30, 2), 3), np.uint8)
    rgb[rng.random(rgb.shape[:2]) < dark] = rng.integers(0, 60)
    readable = rng.random(rgb.shape[:2]) < rng.choice([0.5, 1])
    high, mean = rgb.max(axis=2)[readable], rgb.mean(axis=2, dtype=np.float32)[readable]
    lit = mean[high > 12]
    want = lit.size > 0 and np.median(lit) < 80 and np.percentile(high, 25) < 50
    assert tissue.is_fluorescence(rgb, readable) == want


def test_optical_density_by_hand() -> None:
    glass, stain = np.array([240, 238, 236]), np.array([120, 23, 60])
    rgb = np.tile(glass.astype(np.uint8), (100, 130, 1))
    rgb[20:50, 30:70] = stain
    usable = np.ones(rgb.shape[:2], bool)
    usable[40:] = False
    od = tissue._optical_density(rgb, usable)
    np.testing.assert_allclose(od[20:40, 30:70], np.tile(np.log10((glass + 1) / (stain + 1)), (20, 40, 1)), rtol=1e-5)
    od[20:40, 30:70] = 0
    assert not od.any()


def test_the_glass_is_known_where_it_is_less_bright() -> None:
    """One colour for the whole slide would be at least 16 off at one end."""
    drift = np.linspace(-16, 16, SIZE[1]).round()[None, :, None]
    rgb = np.add((236, 234, 232), np.broadcast_to(drift, (*SIZE, 3))).astype(np.uint8)
    assert np.abs(tissue._glass_colour(rgb, ~NOTHING) - rgb).max() < 8


def brute_fraction(mask: TissueMask, box: np.ndarray) -> float:
    """The overlap of the box with each mask pixel, one by one."""
    (fx, fy), (x, y, w, h) = mask.downsample, box
    area = 0.0
    for r, c in np.argwhere(mask.image):
        across = min(x + w, (c + 1) * fx) - max(x, c * fx)
        down = min(y + h, (r + 1) * fy) - max(y, r * fy)
        area += max(across, 0) * max(down, 0)
    return area / (w * h)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 99),
    downsample=st.tuples(st.floats(0.5, 40), st.floats(0.5, 40)),
    boxes=st.lists(
        st.tuples(st.floats(-150, 600), st.floats(-150, 600), st.floats(0.1, 500), st.floats(0.1, 500)),
        min_size=1,
        max_size=5,
    ),
)
def test_fraction_is_exact(seed: int, downsample: tuple[float, float], boxes: list[tuple[float, ...]]) -> None:
    image = np.random.default_rng(seed).random((7, 13)) < 0.4
    mask = TissueMask(image, downsample, 8.0, "brightfield")
    expected = [brute_fraction(mask, np.array(box)) for box in boxes]
    found = mask.fraction(np.array(boxes))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 99), origin=st.tuples(st.floats(-90, 90), st.floats(-90, 90)), edge=st.floats(1, 99))
def test_the_shares_of_a_grid_are_those_of_its_boxes(seed: int, origin: tuple[float, float], edge: float) -> None:
    mask = TissueMask(np.random.default_rng(seed).random((7, 13)) < 0.4, (9.7, 11.1), 8.0, "brightfield")
    x, y = origin[0] + np.arange(5) * edge, origin[1] + np.arange(4) * edge
    boxes = [(left, top, edge, edge) for top in y for left in x]
    assert np.array_equal(mask.share(x, y[:, None], edge, edge).ravel(), mask.fraction(boxes))


def test_where_there_is_no_tissue_the_share_is_exactly_none() -> None:
    """Sums of a whole mask leave rounding where boxes cut its pixels; a mask of attention asks whether there is any."""
    y, x = np.mgrid[:188, :188]
    image = np.hypot(x - 94, y - 80) < 61
    mask = TissueMask(image, (3013 / 188, 3013 / 188), 8.0, "t")
    boxes = np.array([(64.0 * column, 64.0 * row, 64.0, 64.0) for column in range(47) for row in range(47)])
    shares = mask.fraction(boxes)
    touched = [
        image[int(y * 188 / 3013) : -(-(y + 64) * 188 // 3013), int(x * 188 / 3013) : -(-(x + 64) * 188 // 3013)].any()
        for x, y in boxes[:, :2].astype(int).tolist()
    ]
    assert ((shares > 0) == touched).all()


def test_fraction_by_hand() -> None:
    mask = TissueMask(np.array([[True, False, True]]), (10.0, 4.0), 2.0, "brightfield")
    boxes = [[0, 0, 10, 4], [5, 0, 10, 4], [0, 0, 30, 4], [-10, -4, 20, 8], [25, 2, 10, 4], [40, 0, 5, 5], [3, 3, 0, 0]]
    assert mask.fraction(boxes).tolist() == pytest.approx([1, 0.5, 2 / 3, 0.25, 0.25, 0, 0])
    assert mask.fraction(np.zeros((0, 4))).shape == (0,)
    assert mask.area_mm2 == pytest.approx(8e-6)


REAL = [  # path, um/px of level 0 where the file has none, um/px of the thumbnail, method, share of tissue by eye
    ("slides/CMU-1-Small-Region.svs", None, 8.0, "brightfield", (0.36, 0.46)),
    ("slides/CropBreastSlide.tiff", 0.5, 8.0, "brightfield", (0.95, 1)),
    ("slides/OS-1-detail.ome.tif", None, 8.0, "brightfield", (1, 1)),
    ("slides/kidney-48-5.tif", 2.0, 8.0, "brightfield", (0.003, 0.006)),
    ("slides/multiframe_camelyon_challenge_image.dcm", None, 28.97, "brightfield", (0.2, 0.28)),
    ("slides/jpeg.dicom", None, 16.78, "brightfield", (0.7, 0.9)),
    ("slides/test3-DAPI-2-(387).ndpi", None, 8.0, "fluorescence", (0.7, 0.9)),
    ("slides/small_vectra.qptiff", None, 8.0, "fluorescence", (0.45, 0.6)),
    ("slides/small.svs", None, 8.0, "brightfield", (0.05, 0.3)),
    ("broken/only_glass.svs", None, 8.0, "brightfield", (0, 0)),
    ("broken/grey_1_channel.tif", 0.5, 8.0, "brightfield", (0.65, 0.85)),
    ("broken/rgba_transparent_left.tif", 0.5, 8.0, "brightfield", (0.65, 0.8)),
    ("broken/tile_all_ff.svs", None, 8.0, "brightfield", (0.65, 0.85)),
]


@pytest.mark.parametrize(("path", "mpp", "tissue_mpp", "method", "share"), REAL, ids=[row[0] for row in REAL])
def test_real_slides(path: str, mpp: float | None, tissue_mpp: float, method: str, share: tuple[float, float]) -> None:
    if not (DATA / path).exists():
        pytest.skip(f"{DATA / path} is not here")
    with open_slide(DATA / path, mpp=mpp) as slide:
        mask = find_tissue(slide, TissueConfig(tissue_mpp=tissue_mpp))
        whole = mask.fraction(np.array([[0, 0, *slide.size]]))[0]
    assert mask.method == method
    assert share[0] <= mask.image.mean() <= share[1]
    assert whole == pytest.approx(mask.image.mean(), abs=1e-6)

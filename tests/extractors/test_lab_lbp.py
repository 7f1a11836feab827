"""The hand-made encoder against values worked out by hand."""

from itertools import pairwise

import numpy as np
import pytest

from extractors import EncoderError, load_encoder
from extractors.lab_lbp import BINS, CLASSES, PATTERNS, describe

COLOURS, RINGS = slice(0, 3 * BINS), slice(3 * BINS, None)


def texture(seed: int, shape: tuple[int, int] = (61, 83)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((255, 255, 255), (255, 128, 128)),
        ((0, 0, 0), (0, 128, 128)),
        ((255, 0, 0), (136, 208, 195)),  # CIE: L* 53.24, a* 80.09, b* 67.20; stored L* · 2.55, a* + 128, b* + 128
        ((0, 0, 255), (82, 207, 20)),  # L* 32.30, a* 79.19, b* −107.86; red and blue swapped would show
    ],
)
def test_constant_tile(rgb: tuple[int, ...], lab: tuple[int, ...]) -> None:
    features = describe(np.full((37, 29, 3), rgb, np.uint8))
    expected = np.zeros(222)
    expected[[value // 4 + 64 * i for i, value in enumerate(lab)]] = 1  # four grey values per bin
    expected[[192 + 8, 202 + 8, 212 + 8]] = 1  # all eight neighbours are at least as bright
    assert np.array_equal(features, expected)


def test_one_bright_pixel_by_hand() -> None:
    """5 × 5, ring of radius 1: of the nine inner pixels the centre sees no neighbour as bright, all others see all."""
    from extractors.lab_lbp import _histogram, _ring_codes

    light = np.zeros((5, 5), np.uint8)
    light[2, 2] = 9
    counts = 9 * _histogram(CLASSES[_ring_codes(light, 1)], PATTERNS)
    assert np.allclose(counts, [1, 0, 0, 0, 0, 0, 0, 0, 8, 0])
    light[2, 2], light[2, 1], light[2, 3] = 5, 9, 9  # the centre sees two, which do not stand together
    codes = CLASSES[_ring_codes(light, 1)]
    assert codes[1, 1] == 9
    assert codes[1, 0] == 0


def test_the_classes_are_the_58_uniform_patterns_and_the_rest() -> None:
    assert np.bincount(CLASSES).tolist() == [1, 8, 8, 8, 8, 8, 8, 8, 1, 198]


def test_histograms_sum_to_one() -> None:
    features = describe(texture(0))
    ends = [0, 64, 128, 192, 202, 212, 222]
    assert np.allclose([features[a:b].sum() for a, b in pairwise(ends)], 1)


def test_turned_and_mirrored_tiles_are_the_same() -> None:
    tile = texture(1)
    for other in (np.rot90(tile), tile[::-1], tile[:, ::-1]):
        assert np.array_equal(describe(other), describe(tile))


def test_shuffled_pixels_keep_colour_and_lose_texture() -> None:
    ramp = np.repeat(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    shuffled = np.random.default_rng(2).permutation(ramp.reshape(-1, 3)).reshape(ramp.shape)
    assert np.array_equal(describe(shuffled)[COLOURS], describe(ramp)[COLOURS])
    assert np.abs(describe(shuffled)[RINGS] - describe(ramp)[RINGS]).sum() > 1


def test_stripes_and_checkers_of_the_same_colours_differ() -> None:
    y, x = np.mgrid[:60, :60]
    stripes, checkers = (
        np.where((pattern % 2)[..., None], 200, 90).astype(np.uint8).repeat(3, 2)
        for pattern in (x // 3, x // 3 + y // 3)
    )
    assert np.array_equal(describe(stripes)[COLOURS], describe(checkers)[COLOURS])
    assert not np.array_equal(describe(stripes)[RINGS], describe(checkers)[RINGS])


def test_any_size_and_no_weights() -> None:
    encoder = load_encoder("lab_lbp")
    assert encoder.encode(texture(3, (101, 47))[None]).shape == (1, 222)
    assert encoder.weights_sha256 == "none"
    with pytest.raises(ValueError, match="more than 8 px"):
        encoder.encode(np.zeros((1, 8, 8, 3), np.uint8))
    for weights in ("random", "some/file.pt"):
        with pytest.raises(EncoderError, match="has no weights"):
            load_encoder("lab_lbp", weights)

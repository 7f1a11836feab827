"""How far features that are computed in 16 bits are from those in 32."""

import numpy as np

from extractors import Encoder

TILES = 2


def cosine_to_fp32(encoder: Encoder, device: str, tile_px: int, compile: bool = False) -> float:
    """The least cosine over a few tiles of stained tissue; 1 where fp32 is what it computes in.

    The encoder is loaded, and is left as it was.
    """
    precision = encoder.precision
    if precision == "fp32":
        return 1.0
    tiles = tissue_tiles(TILES, tile_px)
    half = encoder.encode(tiles).numpy().astype(np.float64)
    full = encoder.load(device, "fp32").encode(tiles).numpy().astype(np.float64)
    encoder.load(device, precision, compile)
    norms = np.linalg.norm(half, axis=1) * np.linalg.norm(full, axis=1)
    return float(((half * full).sum(axis=1) / np.maximum(norms, 1e-30)).min())


def tissue_tiles(count: int, px: int) -> np.ndarray:
    """(count, px, px, 3) uint8 of scikit-image's immunohistochemistry image, from its corners inwards."""
    from skimage.data import immunohistochemistry

    image = immunohistochemistry()
    height, width = image.shape[:2]
    edges = [(37 * k + np.arange(px), 61 * k + np.arange(px)) for k in range(count)]
    return np.stack([image[np.ix_(rows % height, columns % width)] for rows, columns in edges])

import numpy as np
import pytest
from PIL import Image

from pipeline.curves import save_curves


@pytest.mark.parametrize("validation", [[0.7, 0.5, 0.6], []])
def test_a_picture_of_the_losses_is_the_same_bytes_each_time(tmp_path, validation):
    made = []
    for name in ("a.png", "b.png"):
        save_curves(tmp_path / name, [0.9, 0.6, 0.3], validation, 1)
        made.append((tmp_path / name).read_bytes())
    assert made[0] == made[1]
    assert len(np.unique(np.asarray(Image.open(tmp_path / "a.png")))) > 10


def test_the_epoch_that_is_kept_moves_the_line(tmp_path):
    for kept in (0, 2):
        save_curves(tmp_path / f"{kept}.png", [0.9, 0.6, 0.3], [0.7, 0.5, 0.6], kept)
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "2.png").read_bytes()


def test_a_single_epoch_is_seen(tmp_path):
    """It makes no line: its colours, blue and orange, are those of points."""
    save_curves(tmp_path / "one.png", [0.9], [0.7], 0)
    pixels = np.asarray(Image.open(tmp_path / "one.png").convert("RGB")).astype(int)
    inside = pixels[:, 100:500]  # left of the legend
    for colour in ((31, 119, 180), (255, 127, 14)):
        assert (np.abs(inside - colour).max(-1) < 10).sum() > 5

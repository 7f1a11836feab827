"""Views against torchvision, one step at a time, and what no view may do."""

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from extractors import views
from extractors.views import Look, looks, view

LOOKS = looks(64, 32, (0.4, 1.0), (0.05, 0.4), 3)


def numbers(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiles(count: int = 6, px: int = 64) -> torch.Tensor:
    """Smooth colours, so that filters that differ at edges only agree."""
    coarse = torch.rand(count, 3, 5, 5, generator=numbers(9))
    return torch.nn.functional.interpolate(coarse, (px, px), mode="bicubic").clamp(0, 1)


def chances(monkeypatch: pytest.MonkeyPatch, **values: float | tuple[float, float]) -> None:
    """Strengths of the colours and of the blur, as they are for this test."""
    for name in ("JITTERED", "GREYED", "BRIGHTNESS", "CONTRAST", "SATURATION", "HUE"):
        monkeypatch.setattr(views, name, values.get(name.lower(), 0.0))


def test_two_wide_views_and_small_ones() -> None:
    found = [view(tiles(), look, numbers()) for look in LOOKS]
    assert [v.shape[-1] for v in found] == [64, 64, 32, 32, 32]
    for v in found:
        assert v.shape[:2] == (6, 3)
        assert float(v.min()) >= 0
        assert float(v.max()) <= 1


def test_the_seed_decides_all() -> None:
    for look in LOOKS:
        assert torch.equal(view(tiles(), look, numbers(1)), view(tiles(), look, numbers(1)))
        assert not torch.equal(view(tiles(), look, numbers(1)), view(tiles(), look, numbers(2)))


def test_each_tile_has_numbers_of_its_own() -> None:
    same = tiles(1).repeat(8, 1, 1, 1)
    for look in LOOKS:
        found = view(same, look, numbers()).flatten(1)
        assert (torch.cdist(found, found) > 0.5).sum() == 8 * 7


def test_a_crop_is_a_part_of_its_tile_of_the_asked_area() -> None:
    """A tile of coordinates: what a view shows of them says where it was cut and how it was turned."""
    axis = (torch.arange(64) + 0.5) / 64
    place = torch.stack([axis.expand(64, 64), axis[:, None].expand(64, 64), torch.zeros(64, 64)])
    cut = views._crop(place.repeat(400, 1, 1, 1), 32, (0.05, 0.4), numbers())
    x, y = cut[:, 0], cut[:, 1]
    width, height = ((v.amax((1, 2)) - v.amin((1, 2))) * 32 / 31 for v in (x, y))
    area = width * height
    assert float(area.min()) > 0.045
    assert float(area.max()) < 0.41
    assert float(area.std()) > 0.08
    assert float((width / height).max()) < 1.36
    right, down = x[:, 0, -1] - x[:, 0, 0], y[:, -1, 0] - y[:, 0, 0]
    straight = right.abs() > 0.01
    seen = {
        (bool(s), bool((r if s else d2) > 0))
        for s, r, d2 in zip(straight, right, x[:, -1, 0] - x[:, 0, 0], strict=True)
    }
    assert len(seen) == 4, "both axes, both ways"
    assert 0.4 < float((down[straight] > 0).float().mean()) < 0.6
    whole = views._crop(tiles(), 64, (1.0, 1.0), numbers())
    assert float((whole.mean((2, 3)) - tiles().mean((2, 3))).abs().max()) < 0.05


@pytest.mark.parametrize("kind", ["brightness", "contrast", "saturation"])
def test_colours_are_torchvisions(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chances(monkeypatch, jittered=1.0, **{kind: 0.3})
    images = tiles() * 0.5 + 0.2  # nothing is clipped
    monkeypatch.setattr(views, "_uniform", lambda count, low, high, _: torch.full((count,), high))
    expected = getattr(tv, f"adjust_{kind}")(images, 1.3)
    torch.testing.assert_close(views._colour(images, numbers()), expected, rtol=1e-3, atol=2e-4)


def test_hue_turns_about_grey(monkeypatch: pytest.MonkeyPatch) -> None:
    chances(monkeypatch, jittered=1.0, hue=1 / 3)
    monkeypatch.setattr(views, "_uniform", lambda count, low, high, _: torch.full((count,), high))
    images = tiles()
    torch.testing.assert_close(views._colour(images, numbers()), images[:, [2, 0, 1]])


def test_grey_has_one_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    chances(monkeypatch, greyed=1.0)
    torch.testing.assert_close(views._colour(tiles(), numbers()), tv.rgb_to_grayscale(tiles(), 3), rtol=1e-3, atol=2e-4)


def test_blur_is_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "_uniform", lambda count, low, high, _: torch.full((count,), 1.3))
    torch.testing.assert_close(views._blur(tiles(), 1.0, numbers()), tv.gaussian_blur(tiles(), [9, 9], [1.3, 1.3]))
    some = views._blur(tiles(), 0.5, numbers())
    changed = (some != tiles()).flatten(1).any(1)
    assert 0 < int(changed.sum()) < len(changed)
    assert torch.equal(views._blur(tiles(), 0.0, numbers()), tiles())


def test_solarised_is_light_turned_dark(monkeypatch: pytest.MonkeyPatch) -> None:
    chances(monkeypatch)
    plain, turned = (view(tiles(), Look(64, (1.0, 1.0), 0, share), numbers()) for share in (0.0, 1.0))
    torch.testing.assert_close(turned, torch.where(plain >= 0.5, 1 - plain, plain))


def test_a_whole_tile_lies_as_it_lay() -> None:
    """Colours change, places do not: edges of a checkerboard stay where they were."""
    axis = torch.arange(64) // 8 % 2
    board = (0.2 + 0.6 * (axis ^ axis[:, None])).expand(4, 3, 64, 64)
    found = view(board, Look(None, (1.0, 1.0), 0.0), numbers())
    assert not torch.equal(found, board)
    for tile in found:
        assert len(tile[:, board[0, 0] < 0.5].T.unique(dim=0)) == len(tile[:, board[0, 0] > 0.5].T.unique(dim=0)) == 1

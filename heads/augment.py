"""Pictures as they might have been scanned, for training. Random numbers are those of torch's generator."""

import torch

from .picture import Picture


def colours(picture: Picture) -> Picture:
    """ScoreNet's: mirrored, and with other colours, some grey, blurred or solarised; no place moves."""
    from torchvision.transforms import v2

    steps = [
        v2.RandomHorizontalFlip(0.5),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(kernel_size=9, sigma=(0.1, 2.0))], 0.1),
        v2.RandomSolarize(128, 0.2),
    ]
    return picture.of_pixels(v2.Compose(steps)(picture.pixels))


def turns(picture: Picture) -> Picture:
    """HATNet's, each half of the time: mirrored along one axis; turned by up to 10° on white."""
    from torchvision.transforms import v2

    pixels = picture.pixels
    if chance(0.5):
        pixels = pixels.flip(1 if chance(0.5) else 2)
    if chance(0.5):
        pixels = v2.RandomRotation((-10, 10), fill=255)(pixels)
    return picture.of_pixels(pixels)


def chance(share: float) -> bool:
    return bool(torch.rand(()) < share)

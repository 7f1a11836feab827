"""Words of a picture as features, by a network that is trained with the head that reads them, in bounded memory."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .picture import MEAN, SD, Pixels


class Words(nn.Module):
    """A picture → (across², D): cells of the whole, row by row, each through a network of timm.

    weights: "hub" (those of timm's name), "random", or a file of this network's weights, of which all must be there.
    Cells go through it `at_a_time`. Of none of them anything is kept for the gradient but where it lies: with the
    gradient of its features at hand, it is cut out and goes through the network again. The network stays as it is in
    use, without dropout and with the means of its batch norms: they would be of a few cells only. vary: while training,
    the cells of a picture are up to this share smaller or larger than px, in four steps.
    """

    mean: Tensor
    sd: Tensor

    def __init__(self, name: str, weights: str, trained: bool, px: int, at_a_time: int, vary: float = 0.0) -> None:
        super().__init__()
        if px < 1 or at_a_time < 1 or not 0 <= vary < 1:
            raise ValueError(
                f"word_px and at_a_time must be at least 1, vary 0 to below 1, not {px}, {at_a_time} and {vary}"
            )
        self.network = made(name, weights).eval().requires_grad_(trained)
        self.dim: int = self.network.num_features  # type: ignore[assignment]
        self.trained, self.px, self.at_a_time, self.vary = trained, px, at_a_time, vary
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("sd", torch.tensor(SD)[:, None, None], persistent=False)

    def train(self, mode: bool = True) -> "Words":
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, picture: Pixels, across: int) -> Tensor:
        with_gradient = self.trained and torch.is_grad_enabled()
        px = self.px
        if self.training and self.vary:
            px = max(1, round(px * (1 + self.vary * (int(torch.randint(5, ())) - 2) / 2)))
        parts = []
        for cells in torch.arange(across**2).split(self.at_a_time):
            if with_gradient:
                parts.append(checkpoint(self.read, picture, cells, across, px, use_reentrant=False))
            else:
                with torch.no_grad():
                    parts.append(self.read(picture, cells, across, px))
        return torch.cat(parts)

    def read(self, picture: Pixels, cells: Tensor, across: int, px: int) -> Tensor:
        images = picture.parts(cells, across, px)
        features: Tensor = self.network((images - self.mean) / self.sd)
        return features


def made(name: str, weights: str) -> nn.Module:
    """A network of timm without its classifier. ValueError for what it does not know, or weights that do not fit."""
    import timm

    if not timm.is_model(name):
        raise ValueError(f"timm has no network {name!r}; timm.list_models() names them")
    network: nn.Module = timm.create_model(name, pretrained=weights == "hub", num_classes=0)
    if weights not in ("hub", "random"):
        load(network, name, weights)
    return network


def load(network: nn.Module, name: str, file: str) -> None:
    from timm.models import load_state_dict

    if not Path(file).is_file():
        raise ValueError(f"cnn_weights {file!r} is no file; it is a file, 'hub' or 'random'")
    classifier = network.pretrained_cfg["classifier"]  # type: ignore[index]
    state = load_state_dict(file, use_ema=False)
    state = {key: value for key, value in state.items() if not key.startswith(f"{classifier}.")}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{file} does not hold the weights of {name}: {error}") from error

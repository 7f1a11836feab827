"""A folded network gives what the network gave, and only what may be folded is."""

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from extractors import load_encoder
from extractors.folding import fold_batch_norms

FOLDED = ["resnet50", "resnet50_trunc", "timm/resnet18", "timm/seresnet50", "timm/resnet26t", "timm/resnet50d"]


def trained(network: nn.Module) -> nn.Module:
    """In float64, with batch norms that have seen something."""
    torch.manual_seed(1)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.track_running_stats:
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 2)
            layer.weight.data.uniform_(0.5, 1.5)
            layer.bias.data.normal_(0, 0.1)
    return network.double().eval().requires_grad_(False)


def norms(network: nn.Module) -> int:
    return sum(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())


def difference(network: nn.Module, folded: nn.Module, px: int = 64) -> float:
    """The largest, in parts of the largest feature."""
    images = torch.randn(2, 3, px, px, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    features = network(images)
    return float((features - folded(images)).abs().max() / features.abs().max())


@pytest.mark.parametrize("name", ["resnet18", "resnet26t", "resnet50", "resnext50_32x4d", "seresnet50", "resnetblur50"])
def test_residual_networks(name: str) -> None:
    network = trained(timm.create_model(name, pretrained=False, num_classes=0))
    state = {key: value.clone() for key, value in network.state_dict().items()}
    before = norms(network)
    folded = fold_batch_norms(network)
    assert before > 0
    assert norms(folded) == 0
    assert difference(network, folded) < 1e-12
    assert difference(network, folded, px=96) < 1e-12  # nothing of the size was frozen
    assert norms(network) == before
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


class Knot(nn.Module):
    """Two convolutions and a batch norm, joined as a case wants it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.second = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.norm = nn.BatchNorm2d(3, track_running_stats=how != "of the batch")

    def forward(self, images: Tensor) -> Tensor:
        first: Tensor = self.first(images)
        if self.how == "plain":
            return self.second(self.norm(first))
        if self.how == "used elsewhere too":
            return self.norm(first) + self.second(first)
        if self.how == "convolution twice":
            return self.first(self.norm(first))
        if self.how == "norm twice":
            return self.norm(self.second(self.norm(first)))
        if self.how == "norm first":
            return self.first(self.norm(images))
        return self.norm(first)  # of the batch


@pytest.mark.parametrize(
    ("how", "left"),
    [
        ("plain", 0),
        ("used elsewhere too", 1),
        ("convolution twice", 1),
        ("norm twice", 1),
        ("norm first", 1),
        ("of the batch", 1),
    ],
)
def test_only_what_may_be_folded(how: str, left: int) -> None:
    network = trained(Knot(how))
    folded = fold_batch_norms(network)
    assert norms(folded) == left
    assert difference(network, folded) < 1e-12


def test_a_network_that_cannot_be_traced_is_refused() -> None:
    class Branching(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images if images.sum() > 0 else -images

    with pytest.raises(torch.fx.proxy.TraceError):
        fold_batch_norms(Branching())


@pytest.mark.parametrize("name", FOLDED)
def test_encoders_of_residual_networks_are_folded(name: str) -> None:
    encoder = load_encoder(name, "random").load(precision="fp32")
    plain = load_encoder(name, "random")
    plain.fold = False  # type: ignore[attr-defined]
    tiles = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)
    features, wanted = encoder.encode(tiles), plain.load(precision="fp32").encode(tiles)
    assert norms(encoder._network) == 0  # type: ignore[attr-defined]
    assert norms(plain._network) > 0  # type: ignore[attr-defined]
    torch.testing.assert_close(features, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))

"""`NetworkEncoder`: any torch network as an encoder. torch is imported when it is needed, not before."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Self

from . import RANDOM, Encoder, EncoderError, EncoderFacts

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

log = logging.getLogger(__name__)


class NetworkEncoder(Encoder):
    """`make()` builds the network; its weights are `facts.source`, or what the user gave.

    `drop` names the beginnings of keys which a checkpoint may hold and this encoder leaves out (a classifier, say).
    Everything else is strict.
    """

    def __init__(
        self,
        facts: EncoderFacts,
        make: Callable[[], nn.Module],
        weights: str | os.PathLike[str] | None = None,
        drop: tuple[str, ...] = (),
    ) -> None:
        super().__init__(facts, weights)
        self.make, self.drop = make, drop
        self._network: nn.Module | None = None

    @cached_property
    def _weights_file(self) -> str:
        from .weights import resolve

        return str(resolve(self.weights, self.facts))

    @cached_property
    def weights_sha256(self) -> str:  # once: hashing 5 GB takes seconds
        from .weights import sha256

        return RANDOM if self.weights == RANDOM else sha256(self._weights_file)

    @property
    def weights_words(self) -> str:
        if self.weights == RANDOM:
            return "RANDOM weights: for benchmarks only"
        return f"weights of {self.facts.source}" if self.weights is None else f"weights from the file {self.weights}"

    def load(self, device: str = "cpu") -> Self:
        target = _usable(device)
        if self._network is None:
            self._network = self._build().eval().requires_grad_(False)
        self._network.to(target)
        return self

    def _build(self) -> nn.Module:
        import torch

        # Forked and seeded: random weights are the same in every process, and the caller's random numbers stay his.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if self.weights == RANDOM:
                return self.make()
            from .weights import fit, read_state

            state, notes = read_state(self._weights_file)  # before the network is made: it fails in a second
            network = self.make()
        state, more = fit(state, network.state_dict(), self.drop, self._weights_file)
        network.load_state_dict(state, strict=True)
        self.notes = (*notes, *more)
        for note in self.notes:
            log.info("%s: %s", self.facts.name, note)
        return network

    def _features(self, tiles: np.ndarray | Tensor) -> Tensor:
        import torch

        if self._network is None:
            raise RuntimeError(f"{self.facts.name}: call load() before encode()")
        if len(tiles) == 0:
            return torch.zeros(0, self.facts.dim)
        try:
            with torch.inference_mode():
                features = self._network(self._normalise(_as_torch(tiles))).float().cpu()
        except AssertionError as error:  # how timm says that a transformer does not take the size
            raise EncoderError(
                f"{self.facts.name} cannot take tiles of {tuple(tiles.shape[1:3])} px: {error}"
            ) from error
        return features.clone()  # a tensor made in inference mode could never be trained on

    def _normalise(self, tiles: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) → float (B, 3, H, W) on the device: one byte per value crosses, not four."""
        import torch

        assert self._network is not None
        device = next(self._network.parameters()).device
        # contiguous: channels-last gave ResNet-18 other last bits at 96 px for odd batch sizes (fp32, CPU, torch 2.15)
        images = tiles.to(device, non_blocking=True).permute(0, 3, 1, 2).contiguous()
        if crop := self.facts.crop_px:
            top, left = (images.shape[2] - crop) // 2, (images.shape[3] - crop) // 2
            images = images[:, :, top : top + crop, left : left + crop]
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (self.facts.mean, self.facts.std))
        return images.float().div_(255).sub_(mean).div_(std)


def _as_torch(tiles: np.ndarray | Tensor) -> Tensor:
    import numpy as np
    import torch

    if isinstance(tiles, torch.Tensor):
        return tiles
    return torch.from_numpy(np.require(tiles, requirements=["C", "W"]))  # copies only what torch cannot share


def _usable(device: str) -> torch.device:
    """A device that works here; otherwise the user learns it now and not in the middle of a run."""
    import torch

    try:
        return torch.empty(1, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # no CUDA in torch is an AssertionError
        reason = str(error).splitlines()[0]
        raise EncoderError(
            f"device {device!r} cannot be used here: {reason}. Use 'cpu', or install a driver"
        ) from error

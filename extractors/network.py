"""`NetworkEncoder`: any torch network as an encoder. torch is imported when it is needed, not before."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from . import PRECISIONS, RANDOM, Encoder, EncoderError, EncoderFacts, Pending
from .folding import fold_batch_norms

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

log = logging.getLogger(__name__)

CHANNELS_LAST_PX = 128  # measured: ResNet-18 at 96 px, fp32, torch 2.15


class NetworkEncoder(Encoder):
    """`make()` builds the network; its weights are `facts.source`, or what the user gave.

    `drop` names the beginnings of keys which a checkpoint may hold and this encoder leaves out (a classifier, say).
    Everything else is strict. fold: batch norms go into convolutions (folding.py); torch.fx can trace the network.
    """

    parallel = True

    def __init__(
        self,
        facts: EncoderFacts,
        make: Callable[[], nn.Module],
        weights: str | os.PathLike[str] | None = None,
        drop: tuple[str, ...] = (),
        fold: bool = False,
    ) -> None:
        super().__init__(facts, weights)
        self.make, self.drop, self.fold = make, drop, fold
        self._network: nn.Module | None = None
        self._optimised: Callable[[Tensor], Tensor] | None = None
        self._layout: torch.memory_format | None = None
        self._laying_out = threading.Lock()
        self._copying: torch.cuda.Stream | None = None

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

    def load(self, device: str = "cpu", precision: str = "auto", compile: bool = False) -> Self:
        target = usable_device(device)
        self.precision = precision_on(target, precision)
        if self._network is None:
            network = self._build().eval().requires_grad_(False)
            self._network = fold_batch_norms(network) if self.fold else network
        self._network.to(target)
        self._device, self._constants = target, self._normalisation(target)
        self._run = self._compiled() if compile else self._network
        self.parallel = not compile  # what torch.compile makes has threads of its own
        return self

    def _compiled(self) -> Callable[[Tensor], Tensor]:
        import torch

        if self._optimised is None:
            assert self._network is not None
            self._optimised = torch.compile(self._network)
        return self._optimised

    def _normalisation(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(tile - mean) / std of values in 0..1, as (tile - a) · b of values in 0..255."""
        import torch

        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (self.facts.mean, self.facts.std))
        return mean * 255, 1 / (std * 255)

    def _build(self) -> nn.Module:
        import torch

        # Forked and seeded: random weights are the same in every process, and the caller's random numbers stay his.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if self.weights == RANDOM:
                return self.make()
            from .weights import fit, read_state

            state, notes = read_state(self._weights_file)  # before the network is made: it fails in a second
            with _undrawn_parameters():
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
        features = self._forward(self._images(_as_torch(tiles).to(self._device))).cpu()
        return features.clone()  # a tensor made in inference mode could never be trained on

    def start(self, tiles: Tensor) -> Pending:
        """On a GPU: copied there, encoded and copied back on its own time. `tiles` should lie in pinned memory."""
        import torch

        if self._network is None or self._device.type != "cuda":
            return super().start(tiles)
        self._check(tiles)
        if self._copying is None:
            self._copying = torch.cuda.Stream(self._device)
        main = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copying):  # while the batch before is still being encoded
            there = tiles.to(self._device, non_blocking=True)
        main.wait_stream(self._copying)
        there.record_stream(main)
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record(main)
        features = self._checked(self._forward(self._images(there)), len(tiles))
        ended.record(main)
        back = torch.empty(features.shape, pin_memory=True)
        back.copy_(features, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(main)
        return _OnGpu(back, started, ended, arrived)

    def _forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → float32 (B, dim), on the device."""
        import torch

        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        try:
            with torch.inference_mode(), torch.autocast(self._device.type, kind, enabled=kind is not None):
                features: Tensor = self._run(images).float()
        except AssertionError as error:  # how timm says that a transformer does not take the size
            raise EncoderError(
                f"{self.facts.name} cannot take tiles of {tuple(images.shape[2:])} px: {error}"
            ) from error
        return features

    def _images(self, tiles: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) → float (B, 3, H, W) where the tiles are: one byte per value crosses, not four."""
        import torch

        if crop := self.facts.crop_px:
            top, left = (tiles.shape[1] - crop) // 2, (tiles.shape[2] - crop) // 2
            tiles = tiles[:, top : top + crop, left : left + crop]
        self._lay_out(min(tiles.shape[1:3]))
        mean, scale = self._constants
        with torch.inference_mode():
            return tiles.permute(0, 3, 1, 2).to(torch.float32, memory_format=self._layout).sub_(mean).mul_(scale)

    def _lay_out(self, px: int) -> None:
        """Channels last is faster, but on a CPU small images then get other last bits in batches of other sizes."""
        import torch

        layout = (
            torch.channels_last if px >= CHANNELS_LAST_PX or self._device.type != "cpu" else torch.contiguous_format
        )
        with self._laying_out:
            if layout != self._layout:
                assert self._network is not None
                self._network.to(memory_format=layout)
                self._layout = layout


def _undrawn_parameters() -> AbstractContextManager[object]:
    """Parameters made in here keep whatever their memory held: to draw numbers for them takes seconds for a large
    network, and the strict loading that follows replaces them all."""
    from torch import nn
    from torch.overrides import TorchFunctionMode

    draws = {"uniform_", "normal_", "trunc_normal_", "erfinv_", "kaiming_uniform_", "kaiming_normal_"}

    class Undrawn(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            target = args[0] if args else kwargs.get("tensor")
            if getattr(function, "__name__", "") in draws and isinstance(target, nn.Parameter):
                return target
            return function(*args, **kwargs)

    return Undrawn()


class _OnGpu(Pending):
    def __init__(self, features: Tensor, started: torch.cuda.Event, ended: torch.cuda.Event, arrived: Any) -> None:
        super().__init__(features, 0.0)
        self._started, self._ended, self._arrived = started, ended, arrived

    def result(self) -> Tensor:
        self._arrived.synchronize()
        self.seconds = self._started.elapsed_time(self._ended) / 1e3
        return self._features


def _as_torch(tiles: np.ndarray | Tensor) -> Tensor:
    import numpy as np
    import torch

    if isinstance(tiles, torch.Tensor):
        return tiles
    return torch.from_numpy(np.require(tiles, requirements=["C", "W"]))  # copies only what torch cannot share


def usable_device(device: str) -> torch.device:
    """A device that works here; otherwise the user learns it now and not in the middle of a run."""
    import torch

    try:
        return torch.empty(1, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # no CUDA in torch is an AssertionError
        reason = str(error).splitlines()[0]
        raise EncoderError(
            f"device {device!r} cannot be used here: {reason}. Use 'cpu', or install a driver"
        ) from error


def precision_on(device: torch.device, wish: str) -> str:
    """What is computed in. auto: half of 32 bits where the device multiplies in it, for the features hardly differ."""
    import torch

    if wish not in PRECISIONS:
        raise EncoderError(f"unknown precision {wish!r}. Known: {', '.join(PRECISIONS)}")
    if wish != "auto":
        return wish
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu":
        has: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 and later
        return "bf16" if has.get("avx512_bf16") or has.get("amx_bf16") else "fp32"
    return "fp32"

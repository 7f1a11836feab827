"""Where batches are encoded: on a GPU, which works on its own time, or on a CPU, each core with a batch of its own.

Threads that share one batch wait for each other after every layer, and all of them for the one that a reader has pushed
aside: reading then costs the encoder twice its own time. With a batch each they only share the cores.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from extractors import Encoder, Pending

if TYPE_CHECKING:
    from torch import Tensor


class Lanes:
    """`count` batches are encoded at a time. Use inside `with`.

    threads: cores that may be used. An encoder that is not `parallel` gets one batch at a time, and all of them.
    """

    def __init__(self, encoder: Encoder, device: str, threads: int) -> None:
        self.gpu = device != "cpu"
        self.count = threads if encoder.parallel and not self.gpu else 1
        self._encoder, self._each = encoder, max(1, threads // self.count)
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Lanes:
        if not self.gpu:
            import torch

            self._pool = ThreadPoolExecutor(self.count, "encoder", torch.set_num_threads, (self._each,))
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def start(self, tiles: Tensor) -> Pending:
        """Begin a batch. Leave `tiles` as they are until `result`, which raises what the encoder raises."""
        if self._pool is None:
            return self._encoder.start(tiles)
        return _InLane(self._pool.submit(self._encode, tiles))

    def _encode(self, tiles: Tensor) -> Pending:
        pending = self._encoder.start(tiles)
        pending.result()
        return pending


class _InLane(Pending):
    def __init__(self, future: Future[Pending]) -> None:
        self._future = future
        self.seconds = 0.0

    def result(self) -> Tensor:
        done = self._future.result()
        self.seconds = done.seconds
        return done.result()

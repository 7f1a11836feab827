"""An object read as a file: in blocks of BLOCK bytes, of which the last KEPT are kept, by any number of threads.

Tiles that lie side by side in a slide lie one after the other in its file, so that most are in a block that is there.
"""

import io
import threading
from collections import OrderedDict
from concurrent.futures import Future

from .errors import RunStopped, UnreadableSlide
from .objects import ObjectPath

BLOCK = 1 << 18
KEPT = 128  # 32 MB of each open slide
LARGE = 4 * BLOCK  # is read by itself, and not kept


class RangedFile(io.RawIOBase):
    """`fault`: why a read failed; libraries take a file that cannot be read for one that is damaged."""

    def __init__(self, path: ObjectPath) -> None:
        self.path, self.size = path, path.stat().st_size
        self.fault: Exception | None = None
        self._position = 0
        self._lock = threading.Lock()
        self._blocks: OrderedDict[int, Future[bytes]] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self.size)[whence]
        return self._position

    def readinto(self, buffer: "memoryview[int]") -> int:  # type: ignore[override]
        data = self.pread(len(buffer), self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def pread(self, count: int, offset: int) -> bytes:
        """As os.pread: less at the end of the file. UnreadableSlide if it is gone, RunStopped if nothing answers."""
        stop = min(offset + count, self.size)
        if stop <= offset:
            return b""
        try:
            if count > LARGE:
                return self.path.read_range(offset, stop)
            first = offset // BLOCK
            data = b"".join(self._block(k) for k in range(first, -(-stop // BLOCK)))
            return data[offset - first * BLOCK : stop - first * BLOCK]
        except OSError as error:
            words = "no permission to read it" if isinstance(error, PermissionError) else "it is not there any more"
            self.fault = UnreadableSlide(str(self.path), "encode", words)
            raise self.fault from error
        except RunStopped as error:
            self.fault = error
            raise

    def _block(self, number: int) -> bytes:
        """Whoever asks first fetches it, whoever asks meanwhile waits."""
        with self._lock:
            kept = self._blocks.get(number)
            if kept is None:
                mine = self._blocks[number] = Future()
                while len(self._blocks) > KEPT:
                    self._blocks.popitem(last=False)
            else:
                self._blocks.move_to_end(number)
        if kept is not None:
            return kept.result()
        try:
            mine.set_result(self.path.read_range(number * BLOCK, min((number + 1) * BLOCK, self.size)))
        except BaseException as error:
            mine.set_exception(error)
            with self._lock:
                self._blocks.pop(number, None)
            raise
        return mine.result()

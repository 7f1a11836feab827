"""Objects of an S3 store by the methods of pathlib that the pipeline uses: s3://bucket/folder/name.

An object is put whole or not at all, and is seen by everybody once it is put (S3 lists and reads are strongly
consistent). There are no folders: a folder is there as long as anything lies in it. Credentials, region and endpoint
come from where s3fs finds them: AWS_… variables, ~/.aws, AWS_ENDPOINT_URL. The only file that names s3fs.

What the network or the server fails at is tried again for PATIENCE_S seconds, then it is RunStopped and never an
OSError: "cannot be reached" must not pass for "is not there".
"""

import errno
import random
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from functools import cache
from pathlib import PurePath, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from .errors import RunStopped, UsageError
from .patience import patience

T = TypeVar("T")
NO_SUCH_RANGE = ("InvalidRange", "416")
SCHEME = "s3:"
BUCKET = r"[A-Za-z0-9._-]{3,255}"
PATIENCE_S = 45.0  # less than a run may be silent (leases.EXPIRY); SLIDESTREAM_NETWORK says otherwise
PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0  # between two tries
ANSWER_S, SLOWEST = 20, 1e6  # seconds without a sign of the server end a try; bytes a second that are put, at least
AT_ONCE = 16  # requests of `unlink_objects`
# Said by the server, and true: to ask again would change nothing. As a disk would say it.
ANSWERS = {
    FileNotFoundError: (errno.ENOENT, "there is no such object or bucket"),
    FileExistsError: (errno.EEXIST, "there is such an object"),
    PermissionError: (errno.EACCES, "no permission, or the credentials are wrong"),
}


class Stat(NamedTuple):
    """Of an object, named as os.stat names it. The time is the server's, in whole seconds."""

    st_size: int
    st_mtime: float
    st_mode: int = stat.S_IFREG

    @property
    def st_mtime_ns(self) -> int:
        return round(self.st_mtime * 1e9)


class ObjectPath(PurePosixPath):
    """s3://bucket/key. Joined, compared and pickled as any path; what touches the store is below.

    FileNotFoundError and PermissionError as of a disk; RunStopped where the store cannot be reached.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return f"s3://{text[4:]}" if text.startswith("s3:/") else text

    def __fspath__(self) -> str:
        raise TypeError(f"{self} is no file of this machine")

    @property
    def key(self) -> str:
        """bucket/key, as fsspec names it. Names that are no UTF-8 are spelt out: S3 has none."""
        name = "/".join(self.parts[1:])
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

    def read_bytes(self) -> bytes:
        """RunStopped also without permission: credentials may end, and what may not be read is not to be replaced."""
        try:
            return self._ask(lambda store: bytes(store.cat_file(self.key)))
        except PermissionError as error:
            raise RunStopped(f"{self}: {error.strerror}") from error

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes start:stop; less at the end of the object, none beyond it."""
        try:
            return self._ask(lambda store: bytes(store.cat_file(self.key, start=start, end=stop)))
        except OSError as error:
            if _code(error) not in NO_SUCH_RANGE:
                raise
            return b""

    def write_bytes(self, data: bytes | memoryview) -> None:
        self._put(bytes(data), "overwrite")

    def create(self, data: bytes) -> None:
        """FileExistsError if there is such an object: of two that create it at once, one does."""
        self._put(data, "create")

    def _put(self, data: bytes, mode: str) -> None:
        # botocore asks whether it may send ("Expect: 100-continue"), and aiohttp waits for the answer for ever.
        seconds = ANSWER_S + len(data) / SLOWEST
        self._ask(lambda store: store.pipe_file(self.key, data, mode=mode, timeout=seconds))

    def unlink(self, missing_ok: bool = False) -> None:
        """What is not there is gone: S3 says no more."""
        self._ask(lambda store: store.rm_file(self.key))

    def mkdir(self, *_: Any, **__: Any) -> None:
        """There are no folders."""

    def stat(self) -> Stat:
        found = self._info()
        if found["type"] == "directory":
            return Stat(0, 0.0, stat.S_IFDIR)
        return _stat(found)

    def exists(self) -> bool:
        return self._kind() != ""

    def is_file(self) -> bool:
        return self._kind() == "file"

    def is_dir(self) -> bool:
        return self._kind() == "directory"

    def iterdir(self) -> Iterator["ObjectPath"]:
        for name, _ in self._listed():
            yield self / name

    def glob(self, pattern: str) -> Iterator["ObjectPath"]:
        """`*`, `?` and [] in any part, no `**`; sorted."""
        wanted = PurePosixPath(pattern).parts
        below = {name.parts[: len(wanted)] for name in self.below()}
        for parts in sorted(below):
            if len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted)):
                yield self.joinpath(*parts)

    def rglob(self, pattern: str) -> Iterator["ObjectPath"]:
        """The objects below whose name fits; folders, which are none, are left out."""
        for name in self.below():
            if fnmatchcase(name.name, pattern):
                yield self / name

    def matching(self, pattern: str) -> Iterator["ObjectPath"]:
        """The objects below whose path fits, with ** for any folders; sorted."""
        from fsspec.utils import glob_translate

        fits = re.compile(glob_translate(pattern))
        yield from (self / name for name in self.below() if fits.match(str(name)))

    def walk(self) -> Iterator[tuple["ObjectPath", list[str], list[str]]]:
        """(folder, its folders, its objects), as os.walk; names that are taken out of the folders are not walked."""
        found = self._listed()
        folders, files = ([name for name, kind in found if kind == wanted] for wanted in ("directory", "file"))
        yield self, folders, files
        for name in folders:
            yield from (self / name).walk()

    def below(self) -> dict[PurePosixPath, Stat]:
        """All objects below, by their path from here; sorted."""
        found = self._ask(lambda store: store.find(self.key, detail=True))
        start = len(self.key) + 1
        return {PurePosixPath(name[start:]): _stat(found[name]) for name in sorted(found) if len(name) > start}

    def remove_tree(self) -> None:
        unlink_objects([self / name for name in self.below()])

    def _listed(self) -> list[tuple[str, str]]:
        """[(name, "file" or "directory")]; none where nothing is."""
        try:
            found = self._ask(lambda store: store.ls(self.key, detail=True))
        except FileNotFoundError:
            return []
        start = len(self.key) + 1
        return [(entry["name"][start:], entry["type"]) for entry in found if len(entry["name"]) > start]

    def _kind(self) -> str:
        try:
            return str(self._info()["type"])
        except FileNotFoundError:
            return ""

    def _info(self) -> dict[str, Any]:
        return self._ask(lambda store: dict(store.info(self.key)))

    def _ask(self, request: Callable[[Any], T]) -> T:
        return _patient(lambda: request(_store()), str(self))


def object_path(text: str) -> ObjectPath:
    """s3://bucket/… as a path. Raises UsageError; credentials in it are not repeated."""
    if "@" in text.removeprefix("s3://").partition("/")[0]:
        raise UsageError("an address with credentials in it would stand in logs: leave them to AWS_… variables")
    path = ObjectPath(SCHEME, *PurePath(text.removeprefix("s3://")).parts)
    if len(path.parts) < 2 or ".." in path.parts or not re.fullmatch(BUCKET, path.parts[1]):
        raise UsageError(f"{text}: write s3://bucket/folder")
    return path


def unlink_objects(paths: Sequence[ObjectPath]) -> None:
    """Many requests at once."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(ObjectPath.unlink, paths):
            pass


def _stat(info: dict[str, Any]) -> Stat:
    return Stat(int(info["size"]), info["LastModified"].timestamp())


_making = threading.Lock()


def _store() -> Any:
    with _making:
        return _made()


@cache
def _made() -> Any:
    """One for all threads of a process: fsspec would make one for each, and a client takes half a second."""
    try:
        import s3fs
    except ImportError as error:
        raise UsageError("s3:// needs s3fs: pip install 'slidestream[s3]'") from error
    once = {"total_max_attempts": 1}  # tries are counted here, and nowhere else
    config = {"retries": once, "connect_timeout": 10, "read_timeout": ANSWER_S, "max_pool_connections": 4 * AT_ONCE}
    # Listings that are kept would hide what other runs write; with one part at a time an object is read by one request.
    store = s3fs.S3FileSystem(
        config_kwargs=config, use_listings_cache=False, skip_instance_cache=True, max_concurrency=1
    )
    store.retries = 1
    # A connection that is cut leaves tasks that nobody asks for; their tracebacks would go to the terminal.
    store.loop.call_soon_threadsafe(store.loop.set_exception_handler, lambda *_: None)
    return store


@cache
def _faults() -> tuple[type[Exception], ...]:
    """What s3fs raises where it was not the request: OSError of 5xx, a connection that was cut, half an answer."""
    import aiohttp
    from botocore.exceptions import BotoCoreError
    from botocore.parsers import ResponseParserError

    return OSError, TimeoutError, aiohttp.ClientError, BotoCoreError, ResponseParserError


class _Patience:
    """Until when a fault is borne. Who has waited in vain just now does not wait again for the next request."""

    def __init__(self) -> None:
        self.gave_up = -1e9

    @property
    def seconds(self) -> float:
        seconds = patience("SLIDESTREAM_NETWORK", PATIENCE_S)
        return 0.0 if time.monotonic() - self.gave_up < seconds else seconds


_patience = _Patience()


def _patient(request: Callable[[], T], name: str) -> T:
    """The answer to a request that may be sent again: to read, put whole, list and delete may all be."""
    started, seconds, pause = time.monotonic(), _patience.seconds, PAUSE_S
    while True:
        try:
            answer = request()
            _patience.gave_up = -1e9
            return answer
        except UsageError:
            raise
        except tuple(ANSWERS) as error:
            _patience.gave_up = -1e9
            raise OSError(*ANSWERS[type(error)], name) from error
        except _faults() as error:
            if _is_answer(error):
                raise
            if _is_usage(error):
                raise UsageError(f"{name}: {_words(error)}") from error
            if time.monotonic() + pause > started + seconds:
                _patience.gave_up = time.monotonic()
                raise RunStopped(f"{name} cannot be reached: {_words(error)}") from error
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, LONGEST_PAUSE_S)


def _words(error: Exception) -> str:
    """What it says, without a password that stands in the address of an endpoint."""
    silent = f"no answer for {ANSWER_S} s" if isinstance(error, TimeoutError) else type(error).__name__
    words = " ".join(str(error).split()) or silent
    return re.sub(r"//[^/@ ]*@", "//", words)[:300]


def _is_answer(error: Exception) -> bool:
    """The server cannot do this at all (it creates no objects), or an object has no such bytes."""
    return isinstance(error, OSError) and (error.errno == errno.ENOSYS or _code(error) in NO_SUCH_RANGE)


def _code(error: Exception) -> str:
    """S3's own name of an error."""
    return str(getattr(error.__cause__, "response", {}).get("Error", {}).get("Code", ""))


def _is_usage(error: Exception) -> bool:
    """No credentials, no such profile, no possible bucket name: botocore says so before it sends anything."""
    from botocore.exceptions import BotoCoreError, ConnectionError, HTTPClientError, IncompleteReadError

    sent = (ConnectionError, HTTPClientError, IncompleteReadError)
    return isinstance(error, BotoCoreError) and not isinstance(error, sent)

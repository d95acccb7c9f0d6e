"""Files behind HTTP, read as they come: one request a file, gone on with where it broke off.

A stream is asked for from one byte to the file's end, so that a server counts one request; what
fails is asked for again from the byte where it stopped, after growing pauses. A file that is gone
is an OSError, as a local one would be; a server or a network that stays away is a DataError, which
stops the run: what was done is kept, and nothing counts as damaged that was only out of reach.
"""

import fcntl
import http.client
import io
import os
import re
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from groundup.core.errors import DataError

PAUSES_S = (1, 2, 4, 8, 16, 32, 60, 60)  # about three minutes in all
FIRST_PAUSES_S = (1, 2)  # before anything has been read: nobody waits minutes for a missing network
LONGEST_PAUSE_S = 300.0
TIMEOUT_S = 60
BETWEEN_REQUESTS_S = 0.1  # of all processes of this machine, to one host
SKIPPED_BYTES = 1 << 20  # read over rather than asked for anew
BUFFER_BYTES = 1 << 18
AGENT = "groundup (reader of public data sets)"
GONE = (401, 403, 404, 410, 451)


class RemoteFile:
    """A file at an address, with what readers ask of a Path: name, suffixes and `open`."""

    def __init__(self, url: str, headers: dict[str, str] | None = None) -> None:
        self.url = url
        self.headers = headers or {}
        self.failure: DataError | None = None

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the address."""
        return unquote(Path(urlsplit(self.url).path).name)

    @property
    def suffix(self) -> str:
        """The last suffix of the name."""
        return Path(self.name).suffix

    @property
    def suffixes(self) -> list[str]:
        """All suffixes of the name."""
        return Path(self.name).suffixes

    def open(self, mode: str = "rb") -> BinaryIO:
        """Return a stream that can seek; nothing is asked for before the first read."""
        return io.BufferedReader(RemoteStream(self), BUFFER_BYTES)


class RemoteStream(io.RawIOBase):
    """The bytes of a remote file from wherever it is told to stand."""

    def __init__(self, file: RemoteFile) -> None:
        self.file, self.place = file, 0
        self.size: int | None = None
        self.response: Any = None

    def readable(self) -> bool:
        """Say yes."""
        return True

    def seekable(self) -> bool:
        """Say yes."""
        return True

    def tell(self) -> int:
        """Return where it stands."""
        return self.place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Stand elsewhere; short ways forward are read over."""
        if whence == os.SEEK_END and self.size is None:
            with remembering(self.file):
                self.ask()
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.size or 0}[whence]
        target = start + offset
        if self.response is not None and 0 < target - self.place <= SKIPPED_BYTES:
            while self.place < target and self.read(target - self.place):
                pass
        if target != self.place:
            self.drop()
            self.place = target
        return target

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with the next bytes; 0 at the end of the file."""
        with remembering(self.file):
            pauses = list(PAUSES_S)
            while self.size is None or self.place < self.size:
                try:
                    if self.response is None:
                        self.ask()
                        if self.size is not None and self.place >= self.size:
                            break
                    count = self.response.readinto(buffer)
                    if count:
                        self.place += count
                        return int(count)
                    if self.size is None and not self.response.length:
                        self.size = self.place  # the server did not say how much there is
                        break
                    problem: Exception = OSError("the connection was closed")
                except (http.client.HTTPException, OSError) as err:
                    if isinstance(err, FileNotFoundError):
                        raise
                    problem = err
                self.drop()
                if not pauses:
                    raise out_of_reach(self.file.url, problem)
                time.sleep(pauses.pop(0))
        return 0

    def ask(self) -> None:
        """Ask for everything from here on."""
        self.response = request(self.file.url, self.file.headers, start=self.place)
        if self.response.status == 206:
            total = self.response.headers.get("Content-Range", "").rpartition("/")[2]
            self.size = int(total) if total.isdigit() else self.size
        elif self.response.status == 416:  # asked from the end on
            self.size = self.place
            self.drop()
        else:  # the server knows no ranges: begin at the beginning
            length = self.response.headers.get("Content-Length")
            self.size = int(length) if length else self.size
            left = self.place
            while left and (piece := self.response.read(min(left, SKIPPED_BYTES))):
                left -= len(piece)

    def drop(self) -> None:
        """Let go of the connection."""
        if self.response is not None:
            self.response.close()
            self.response = None

    def close(self) -> None:
        """Let go of everything."""
        self.drop()
        super().close()


@contextmanager
def remembering(file: RemoteFile) -> Iterator[None]:
    """Keep a DataError as the file's failure: libraries on its way to the reader may swallow it."""
    try:
        yield
    except DataError as err:
        file.failure = err
        raise


def request(
    url: str,
    headers: dict[str, str] | None = None,
    start: int | None = None,
    stop: int | None = None,
    *,
    first: bool = False,
) -> Any:
    """Return the response to a GET, of the bytes from `start` to before `stop` where given.

    Refusals that may pass (408, 429, 5xx, no connection) are tried again, politely.
    """
    pauses = list(PAUSES_S)
    while True:
        asked = urllib.request.Request(url, headers={"User-Agent": AGENT})
        if start is not None:
            asked.add_header("Range", f"bytes={start}-{stop - 1 if stop else ''}")
        for name, value in (headers or {}).items():
            asked.add_unredirected_header(name, value)  # a token is for the hub, not its storage
        wait_turn(url)
        advised = 0.0
        try:
            return urllib.request.urlopen(asked, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as err:
            if err.code == 416:
                return err
            if err.code in GONE:
                raise FileNotFoundError(err.code, f"status {err.code} {err.reason}", url) from err
            if err.code not in (408, 429) and err.code < 500:
                raise out_of_reach(url, err) from err
            advised = advised_pause(err.headers.get("Retry-After"))
            problem: Exception = err
        except (OSError, http.client.HTTPException) as err:
            problem = err
            if first:
                pauses = pauses[: len(FIRST_PAUSES_S)]
                first = False
        if not pauses:
            raise out_of_reach(url, problem) from problem
        time.sleep(max(pauses.pop(0), advised))


def advised_pause(text: str | None) -> float:
    """Return the seconds that a server asks to wait, bounded."""
    return min(float(text), LONGEST_PAUSE_S) if text and re.fullmatch(r"\d+", text) else 0.0


def out_of_reach(url: str, err: Exception) -> DataError:
    """Return the error for a server that does not answer as it should."""
    why = " ".join(str(getattr(err, "reason", None) or err).split())
    code = f"status {err.code} " if isinstance(err, urllib.error.HTTPError) else ""
    return DataError(
        f"{url} cannot be reached ({code}{why}): check the address and the network; the same "
        "command goes on from here"
    )


def read_whole(url: str, headers: dict[str, str] | None = None) -> bytes:
    """Return the content of a small file; a DataError where there is none or no network."""
    try:
        with request(url, headers, first=True) as response:
            return bytes(response.read())
    except FileNotFoundError as err:
        raise DataError(f"{url} cannot be read ({err.strerror}): check the name") from err
    except (OSError, http.client.HTTPException) as err:
        raise out_of_reach(url, err) from err


def read_range(url: str, start: int, stop: int) -> bytes:
    """Return the bytes from `start` to before `stop`; fewer if the file ends before."""
    pauses = list(PAUSES_S)
    while True:
        try:
            with request(url, start=start, stop=stop) as response:
                if response.status == 416:
                    return b""
                if response.status != 206:
                    raise DataError(f"{url}: the server answers no requests for byte ranges")
                content = bytes(response.read(stop - start))
                if len(content) < stop - start and response.length:
                    raise OSError("the connection was closed")  # the client would not say so
                return content
        except (http.client.HTTPException, OSError) as err:
            if isinstance(err, FileNotFoundError):
                raise
            if not pauses:
                raise out_of_reach(url, err) from err
            time.sleep(pauses.pop(0))


def wait_turn(url: str) -> None:
    """Wait until a request may go out: all processes of this machine share a host's pace."""
    host = re.sub(r"[^\w.-]", "-", urlsplit(url).netloc)
    file = Path(tempfile.gettempdir()) / f"groundup-{os.getuid()}-{host}.turn"
    with open(os.open(file, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        text = handle.read()
        last = float(text) if text else 0.0
        now = time.time()
        pause = min(last + BETWEEN_REQUESTS_S - now, BETWEEN_REQUESTS_S)
        turn = now + max(0.0, pause)
        handle.seek(0)
        handle.truncate()
        handle.write(f"{turn:.6f}".encode())
    time.sleep(max(0.0, turn - now))


def size_of(url: str, headers: dict[str, str] | None = None) -> int:
    """Return the size of a file, 0 where the server does not say; a DataError if there is none."""
    try:
        with request(url, headers, start=0, stop=1, first=True) as response:
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
            length = total or response.headers.get("Content-Length", "")
            return int(length) if str(length).isdigit() else 0
    except FileNotFoundError as err:
        raise DataError(f"{url} cannot be read ({err.strerror}): check the address") from err

"""Download a file over HTTP: resumed, retried, checked, and renamed into place when it is complete.

The bytes that have arrived lie next to the target in `.NAME.part`, and `.NAME.part.json` states where they come from.
A later call, also of another process, continues there if the server confirms that the file is the same (`If-Range`),
or if the digest of the whole is known; else it starts again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

import requests
import urllib3
from filelock import FileLock, Timeout
from requests import exceptions as refusals

from svp_bench._version import __version__
from svp_bench.core.atomic import file_digest, replacing
from svp_bench.core.errors import DataError, UsageError, file_size, one_line, printable
from svp_bench.core.terminal import has_width
from svp_bench.data.sources import Note

CONNECT_S = 10.0  # until a connection is there
STALL_S = 30.0  # without a byte, or with fewer than MIN_RATE a second
MIN_RATE = 256
ATTEMPTS = 5  # in a row that bring nothing new, at one address
MAX_WAIT_S = 120.0  # that a server may ask for
MAX_REDIRECTS = 10
PROGRESS_S = 10.0  # between two lines where there is no terminal

_CHUNK = 2**18
_PROGRESS_BYTES = 1024  # a cut connection that brought fewer brought nothing
_LATER = (408, 425, 429, 500, 502, 503, 504)
_DIGEST = re.compile(r"(?:(sha256|md5):)?([0-9a-f]{64}|[0-9a-f]{32})")
_BAR = threading.Lock()  # a terminal shows one bar; further downloads write lines


class _UnusableError(Exception):
    """An address does not give the file; the text is the reason."""


class _InterruptedError(Exception):
    """A request failed, but the next may succeed.

    Attributes:
        wait: Seconds that the server asks to wait; None if it does not.
    """

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def silent(line: str) -> None:
    """Write no progress: the `note` for no lines and no bar."""


def fetch(
    addresses: Sequence[str],
    target: Path,
    *,
    digest: str | None = None,
    size: int | None = None,
    offline: bool = False,
    note: Note = silent,
) -> Path:
    """Return a file that is there and as expected, or download it from the first address that gives it.

    Args:
        addresses: http(s) addresses of the same file, in the order in which they are tried.
        target: The file; its folder is created.
        digest: "sha256:…" or "md5:…" of the file, if known.
        size: Its size in bytes, if known.
        offline: Use no network.
        note: Called with lines about the progress. A terminal shows a bar as well, unless it is `silent`.

    Returns:
        `target`.

    Raises:
        UsageError: If `digest` is malformed, or there is no address.
        DataError: If no address gives the file, it cannot be written, or it is not there while offline.
    """
    check = _Check(digest, size)
    if target.exists():
        problem = check.problem(target)
        if problem is None:
            return target
        if offline:
            raise DataError(f"{target}: {problem}; run without --offline to download it again")
        note(f"{target}: {problem}; it is downloaded again")
    if offline:
        raise DataError(f"{target} is not there and --offline allows no download; put the file there, or use --from")
    if not addresses:
        raise UsageError(f"no address of {target.name} is known; give one with --mirror, or a file with --from")
    try:
        with _locked(target, note):
            if target.exists() and check.problem(target) is None:  # another process was faster
                return target
            return _first_of(addresses, target, check, note)
    except OSError as error:
        raise DataError(f"{error.filename or target}: cannot be written ({error.strerror or error})") from None


class _Check:
    """Size and digest that a file should have."""

    def __init__(self, digest: str | None, size: int | None) -> None:
        match = None if digest is None else _DIGEST.fullmatch(digest.lower())
        if digest is not None and (match is None or len(match[2]) != (32 if match[1] == "md5" else 64)):
            raise UsageError(f"digest {digest!r} is neither sha256: with 64 nor md5: with 32 hexadecimal digits")
        self.digest = None if match is None else f"{match[1] or 'sha256'}:{match[2]}"
        self.size = size

    def problem(self, path: Path) -> str | None:
        if not path.is_file():
            raise DataError(f"{path} is not a file; move it away")
        found = path.stat().st_size
        if self.size is not None and found != self.size:
            return f"it has {found} bytes, expected {self.size}"
        if self.digest is not None and (actual := file_digest(path, self.digest.partition(":")[0])) != self.digest:
            return f"its digest is {actual}, expected {self.digest}"
        return None


@contextmanager
def _locked(target: Path, note: Note) -> Iterator[None]:
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.parent / f".{target.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        note(f"{target.name}: another process downloads it; waiting")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _first_of(addresses: Sequence[str], target: Path, check: _Check, note: Note) -> Path:
    part = _Part(target)
    reasons: dict[str, str] = {}
    with requests.Session() as session:
        session.max_redirects = MAX_REDIRECTS
        session.headers.update({"User-Agent": f"svp-bench/{__version__}", "Accept-Encoding": "identity"})
        for address in addresses:
            try:
                _download(session, address, part, check, note)
            except _UnusableError as error:
                reasons[shown_address(address)] = str(error)
                continue
            with part.path.open("rb+") as file:
                os.fsync(file.fileno())
            part.path.replace(target)
            part.delete()
            return target
    tried = "; ".join(f"{address}: {reason}" for address, reason in reasons.items())
    raise DataError(
        f"cannot download {target.name} ({tried}); give another address with --mirror, or a file of this machine with "
        "--from"
    )


def shown_address(address: str) -> str:
    """Return an address for messages and manifests, without passwords and the query, which may hold a token."""
    try:
        parts = urlsplit(address)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return printable(address)
    return printable(f"{parts.scheme}://{host}{parts.path}" if host else address)


@dataclass(frozen=True)
class _Begun:
    """What `.NAME.part.json` states: the address, how the server marks this version of the file, and its size."""

    address: str
    validator: str | None
    total: int | None
    encoded: bool


class _Part:
    """The bytes of a file that have arrived."""

    def __init__(self, target: Path) -> None:
        self.name = target.name
        self.path = target.with_name(f".{target.name}.part")
        self._state = target.with_name(f".{target.name}.part.json")

    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def begun(self) -> _Begun | None:
        try:
            return _Begun(**json.loads(self._state.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # none, or damaged
            return None

    def begin(self, state: _Begun) -> None:
        self.path.write_bytes(b"")
        with replacing(self._state, durable=False) as file:
            file.write(json.dumps(vars(state)).encode())

    def delete(self) -> None:
        self._state.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


def _download(session: requests.Session, address: str, part: _Part, check: _Check, note: Note) -> None:
    """Fill `part` with the whole file and check it.

    Raises:
        _UnusableError: If the address does not give the file.
    """
    if urlsplit(address).scheme not in ("http", "https"):
        raise _UnusableError("not an http or https address")
    best, failed = part.size(), 0
    while True:
        try:
            resumed = _request(session, address, part, check, note)
            problem = check.problem(part.path)
            if problem is None:
                return
            part.delete()
            raise _InterruptedError(problem) if resumed else _UnusableError(problem)
        except _InterruptedError as error:
            have = part.size()
            failed = 1 if have >= best + _PROGRESS_BYTES else failed + 1
            best = max(best, have)
            if failed >= ATTEMPTS:
                raise _UnusableError(f"{error} ({failed} attempts)") from None
            wait = 0.5 * 2 ** (failed - 1) if error.wait is None else error.wait
            note(f"{part.name}: {error}; next attempt in {wait:g} s")
            time.sleep(wait)


def _request(session: requests.Session, address: str, part: _Part, check: _Check, note: Note) -> bool:
    """Continue the file with one request; return whether it continued bytes of an earlier one.

    Raises:
        _InterruptedError: If the connection or the server failed, so that another request may succeed.
        _UnusableError: If it would not.
    """
    have, begun, headers = part.size(), part.begun(), {}
    same = begun is not None and begun.address == address and begun.validator is not None
    if begun is None or begun.encoded or not (same or check.digest):
        have = 0
    if have:
        headers["Range"] = f"bytes={have}-"
        if begun and begun.validator and same:
            headers["If-Range"] = begun.validator
    try:
        response = session.get(address, headers=headers, stream=True, timeout=(CONNECT_S, STALL_S))
    except refusals.TooManyRedirects:
        raise _UnusableError(f"redirected more than {MAX_REDIRECTS} times") from None
    except refusals.SSLError as error:
        raise _UnusableError(_reason(error)) from None
    except ValueError as error:  # an address that cannot be, its own or of a redirect
        text = "redirects to an address that is not http or https" if isinstance(error, refusals.InvalidSchema) else ""
        raise _UnusableError(text or _reason(error)) from None
    except (OSError, urllib3.exceptions.HTTPError) as error:
        raise _InterruptedError(_reason(error)) from None
    with response:
        if response.status_code == 416 and have:
            whole = response.headers.get("Content-Range", "").endswith(f"*/{have}")
            if whole and (check.digest or begun is None or begun.total in (None, have)):
                return True  # all of it had arrived
            part.delete()
            raise _InterruptedError("the file there is another one now")
        _check_answer(response, part.name, check)
        if response.status_code == 206:
            have, total = _continued(response, have, begun, part)
        else:
            have, total = 0, _length(response)
        if total is not None and check.size is not None and total != check.size:
            raise _UnusableError(f"it has {total} bytes there, expected {check.size}")
        free = shutil.disk_usage(part.path.parent).free
        if total is not None and total - have > free:
            raise DataError(f"{part.path.parent}: {part.name} needs {file_size(total)}, {file_size(free)} are free")
        if not have:
            part.begin(_Begun(address, _validator(response), total, _is_encoded(response)))
        _receive(response, part, have, total, check, note)
    return have > 0


def _check_answer(response: requests.Response, name: str, check: _Check) -> None:
    status = f"{response.status_code} {printable(response.reason or '')}".strip()
    if response.status_code in _LATER:
        wait = _retry_after(response)
        if wait is not None and wait > MAX_WAIT_S:
            raise _UnusableError(f"{status}, and asks to wait {wait:.0f} s")
        raise _InterruptedError(status, wait)
    if response.status_code not in (200, 206):
        raise _UnusableError(status)
    hops = [urlsplit(hop.url).scheme for hop in (*response.history, response)]
    if check.digest is None and "https" in hops and hops[-1] == "http":
        raise _UnusableError("redirects from https to http, and no digest is known")
    if response.headers.get("Content-Type", "").startswith("text/html") and not name.endswith((".html", ".htm")):
        raise _UnusableError("a web page instead of the file: the link is dead, or needs a log-in or confirmation")


def _continued(response: requests.Response, have: int, begun: _Begun | None, part: _Part) -> tuple[int, int | None]:
    """Return where a partial answer begins, and the size of the whole file."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    total = None if match is None or match[2] == "*" else int(match[2])
    other = begun is not None and None not in (total, begun.total) and total != begun.total
    if match is None or int(match[1]) != have or not have or other or _is_encoded(response):
        part.delete()
        raise _InterruptedError("the file there is another one now" if other else "answers with the wrong range")
    return have, total if begun is None else total or begun.total


def _receive(response: requests.Response, part: _Part, have: int, total: int | None, check: _Check, note: Note) -> None:
    decode = _is_encoded(response) and not part.name.endswith((".gz", ".tgz"))  # servers call those encoded as well
    since, before = time.monotonic(), have
    with part.path.open("ab") as file, _progress(part.name, have, total, note) as show:
        while True:
            try:
                chunk = response.raw.read1(_CHUNK, decode_content=decode)
            except urllib3.exceptions.HTTPError as error:
                raise _InterruptedError(f"{_reason(error)} after {file_size(have)}") from None
            if not chunk:
                break
            file.write(chunk)
            file.flush()  # so that it is there if this process is killed
            have += len(chunk)
            show(have)
            if check.size is not None and have > check.size:
                break
            now = time.monotonic()
            if now - since >= STALL_S:
                if have - before < MIN_RATE * (now - since):
                    raise _InterruptedError(f"fewer than {MIN_RATE} bytes/s after {file_size(have)}")
                since, before = now, have
    if total is not None and have < total:
        raise _InterruptedError(f"ended after {file_size(have)} of {file_size(total)}")
    if check.size is not None and have > check.size:
        part.delete()
        raise _UnusableError(f"sends more than the {check.size} bytes expected")
    stated = total is not None or response.headers.get("Transfer-Encoding", "").lower() == "chunked" or decode
    if not stated and check.size is None and check.digest is None:
        note(f"{part.name}: the server states no length; whether its {file_size(have)} are whole cannot be checked")


def _is_encoded(response: requests.Response) -> bool:
    return response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity")


def _length(response: requests.Response) -> int | None:
    """Return the size of the file that an answer states, or None."""
    text = response.headers.get("Content-Length", "").strip()
    return int(text) if re.fullmatch(r"[0-9]{1,20}", text) and not _is_encoded(response) else None


def _validator(response: requests.Response) -> str | None:
    """Return what `If-Range` compares: a strong ETag, else the time of the last change."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified")


def _retry_after(response: requests.Response) -> float | None:
    """Return the seconds of a header `Retry-After`: a number or a date."""
    text = response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _reason(error: BaseException) -> str:
    """Return the cause of an error of requests or urllib3 in a few words."""
    inner: object = error
    while isinstance(inner, BaseException):
        if isinstance(inner, urllib3.exceptions.NameResolutionError):
            return "unknown host"
        timed_out = isinstance(inner, (refusals.ConnectTimeout, urllib3.exceptions.ConnectTimeoutError))
        if timed_out and not isinstance(inner, urllib3.exceptions.NewConnectionError):  # a subclass, of any failure
            return f"no connection within {CONNECT_S:g} s"
        if isinstance(inner, (refusals.ReadTimeout, urllib3.exceptions.ReadTimeoutError)):
            return f"no data for {STALL_S:g} s"
        if isinstance(inner, OSError) and inner.strerror and not isinstance(inner, refusals.RequestException):
            return inner.strerror[:1].lower() + inner.strerror[1:]
        if isinstance(inner, urllib3.exceptions.IncompleteRead):
            return "the connection was cut"
        following = getattr(inner, "reason", None) or inner.__cause__ or (inner.args[-1] if inner.args else None)
        if following is inner or not isinstance(following, BaseException):
            break
        inner = following
    if type(inner).__name__ == "IncompleteRead":
        return "the connection was cut"
    return one_line(printable(inner))[:120]


@contextmanager
def _progress(name: str, have: int, total: int | None, note: Note) -> Iterator[Callable[[int], None]]:
    """Yield a function that shows how many bytes are there: a bar on a terminal, else a line now and then."""
    if note is not silent and has_width(sys.stderr) and _BAR.acquire(blocking=False):
        try:
            with _bar(name, have, total) as show:
                yield show
        finally:
            _BAR.release()
        return
    last = time.monotonic()

    def line(count: int) -> None:
        nonlocal last
        if time.monotonic() - last >= PROGRESS_S:
            last = time.monotonic()
            note(f"{name}: {file_size(count)}{f' of {file_size(total)}' if total else ''}")

    yield line


@contextmanager
def _bar(name: str, have: int, total: int | None) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task(escape(name), total=total, completed=have)
        yield lambda count: bars.update(bar, completed=count)

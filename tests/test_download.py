"""Downloads from servers that cut, stall, refuse, lie and change: real requests against loopback."""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import wait_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svp_bench.core.errors import DataError, UsageError
from svp_bench.prepare import download
from svp_bench.prepare.download import fetch

CONTENT = random.Random(7).randbytes(300_000)
DIGEST = "sha256:" + hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """A file server; `script` holds what the next requests meet, then it serves well.

    Attributes:
        sent: Bytes of the bodies.
        asked: (path, Range header) of each request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.content = CONTENT
        self.etag: str | None = '"one"'
        self.script: list[Callable[[Answer], None]] = []
        self.sent = 0
        self.asked: list[tuple[str, str | None]] = []
        self.ranges = True

    def url(self, path: str = "data.bin") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients hang up


class Answer(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Range"]))
        if self.server.script:
            self.server.script.pop(0)(self)
        else:
            self.serve()

    def start(self, status: int, headers: dict[str, object]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def body(self, content: bytes) -> None:
        self.wfile.write(content)
        self.server.sent += len(content)

    def serve(self, most: int | None = None, claimed: int | None = None) -> None:
        """Send the file or the range asked for; `most` bytes of it, and then hang up."""
        content, headers = self.server.content, {}
        if self.server.etag:
            headers["ETag"] = self.server.etag
        asked = self.headers["Range"]
        status = 200
        if asked and self.server.ranges and self.headers["If-Range"] in (None, self.server.etag):
            begin = int(asked.removeprefix("bytes=").rstrip("-"))
            if begin >= len(content):
                self.start(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": 0})
                return
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            status, content = 206, content[begin:]
        self.start(status, {**headers, "Content-Length": claimed or len(content)})
        self.body(content if most is None else content[:most])
        if most is not None or claimed:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


def status(code: int, **headers: object) -> Callable[[Answer], None]:
    return lambda answer: answer.start(
        code, {"Content-Length": 0, **{k.replace("_", "-"): v for k, v in headers.items()}}
    )


def cut(most: int = 100_000) -> Callable[[Answer], None]:
    return lambda answer: answer.serve(most)


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Server]]:
    running: list[Server] = []
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)

    def start() -> Server:
        server = Server()
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture
def server(servers: Callable[[], Server]) -> Server:
    return servers()


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record the waits between attempts instead of waiting."""
    found: list[float] = []
    clock = SimpleNamespace(sleep=found.append, monotonic=time.monotonic, time=time.time)
    monkeypatch.setattr(download, "time", clock)
    return found


def refused(*addresses: str, target: Path, **known: Any) -> str:
    with pytest.raises(DataError) as caught:
        fetch(addresses, target, **known)
    assert not target.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def only_target(folder: Path) -> bool:
    return {path.name for path in folder.iterdir()} - {".data.bin.lock"} == {"data.bin"}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "data.bin"


# ---- well


def test_a_file_is_downloaded_once(server: Server, target: Path) -> None:
    for _ in range(2):
        assert fetch([server.url()], target, digest=DIGEST, size=len(CONTENT)) == target
    assert target.read_bytes() == CONTENT
    assert len(server.asked) == 1
    assert only_target(target.parent)
    assert fetch([server.url()], target, digest=DIGEST, offline=True) == target


def test_md5_and_the_digest_without_its_name(server: Server, target: Path) -> None:
    fetch([server.url()], target, digest="md5:" + hashlib.md5(CONTENT).hexdigest())
    fetch([server.url()], target, digest=DIGEST.removeprefix("sha256:").upper())
    assert len(server.asked) == 1
    for wrong in ("sha256:12", "sha1:" + "0" * 40, "0" * 32, "md5:" + "0" * 64):
        with pytest.raises(UsageError, match="neither sha256: with 64 nor md5: with 32"):
            fetch([server.url()], target, digest=wrong)


def test_a_changed_file_on_disk_is_replaced(server: Server, target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(b"x" * len(CONTENT))
    lines: list[str] = []
    with pytest.raises(DataError, match=r"its digest is .*, expected sha256:.*run without --offline"):
        fetch([server.url()], target, digest=DIGEST, offline=True)
    fetch([server.url()], target, digest=DIGEST, note=lines.append)
    assert target.read_bytes() == CONTENT
    assert "it is downloaded again" in lines[0]


def test_offline_without_the_file(server: Server, target: Path) -> None:
    text = refused(server.url(), target=target, offline=True)
    assert str(target) in text
    assert "--offline" in text
    assert not server.asked


# ---- interrupted


def test_cut_connections_continue_where_they_ended(server: Server, target: Path, waits: list[float]) -> None:
    server.script = [cut(), cut()]
    fetch([server.url()], target)
    assert target.read_bytes() == CONTENT
    assert [asked for _, asked in server.asked] == [None, "bytes=100000-", "bytes=200000-"]
    assert server.sent == len(CONTENT)
    assert waits == [0.5, 0.5]  # each brought something


@given(
    st.lists(
        st.integers(0, len(CONTENT) - 1).map(cut) | st.sampled_from([429, 500, 503]).map(status),
        max_size=download.ATTEMPTS - 1,
    ),
    st.booleans(),
    st.sampled_from([None, '"one"', 'W/"weak"']),
    st.sampled_from([None, DIGEST]),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_few_failures_end_in_the_whole_file(
    waits: list[float],
    tmp_path_factory: pytest.TempPathFactory,
    script: list[Callable[[Answer], None]],
    ranges: bool,
    etag: str | None,
    digest: str | None,
) -> None:
    server = Server()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        server.script, server.ranges, server.etag = [*script], ranges, etag
        target = tmp_path_factory.mktemp("any") / "data.bin"
        assert fetch([server.url()], target, digest=digest).read_bytes() == CONTENT
        assert only_target(target.parent)
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_that_always_cuts_at_the_same_place_ends(server: Server, target: Path, waits: list[float]) -> None:
    server.ranges = False
    server.script = [cut()] * 20
    text = refused(server.url(), target=target)
    assert "the connection was cut after 97.7 KiB" in text
    assert len(server.asked) == download.ATTEMPTS
    assert waits == sorted(waits)


def test_a_server_that_ignores_ranges(server: Server, target: Path) -> None:
    server.ranges = False
    server.script = [cut()]
    fetch([server.url()], target)
    assert target.read_bytes() == CONTENT


def test_the_file_changes_between_two_ranges(server: Server, target: Path) -> None:
    """The server sees that by If-Range, and sends the whole new file."""

    def change(answer: Answer) -> None:
        answer.serve(100_000)
        server.content, server.etag = CONTENT[::-1], '"two"'

    server.script = [change]
    fetch([server.url()], target)
    assert target.read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_validator_and_digest_nothing_is_continued(server: Server, target: Path, etag: str | None) -> None:
    server.etag = etag
    server.script = [cut()]
    fetch([server.url()], target)
    assert [asked for _, asked in server.asked] == [None, None]
    assert target.read_bytes() == CONTENT


def test_with_a_digest_a_mirror_continues_what_another_began(servers: Callable[[], Server], target: Path) -> None:
    first, second = servers(), servers()
    first.script = [cut(), *[status(404)] * 2]
    fetch([first.url(), second.url()], target, digest=DIGEST)
    assert second.asked == [("/data.bin", "bytes=100000-")]
    assert target.read_bytes() == CONTENT


def test_a_range_that_does_not_fit_the_digest_starts_again(server: Server, target: Path) -> None:
    def change(answer: Answer) -> None:
        answer.server.content = b"y" * len(CONTENT)
        answer.serve(100_000)
        answer.server.content = CONTENT

    server.etag = None
    server.script = [change]
    fetch([server.url()], target, digest=DIGEST)
    assert target.read_bytes() == CONTENT
    assert [asked for _, asked in server.asked] == [None, "bytes=100000-", None]


def test_wrong_ranges(server: Server, target: Path) -> None:
    def other_range(answer: Answer) -> None:
        answer.start(206, {"Content-Range": f"bytes 0-9/{len(CONTENT)}", "Content-Length": 10, "ETag": '"one"'})
        answer.body(CONTENT[:10])

    server.script = [cut(), other_range, cut(), status(206)]
    fetch([server.url()], target)
    assert target.read_bytes() == CONTENT


def test_all_bytes_had_arrived(server: Server, target: Path) -> None:
    """A process died between the last byte and the renaming."""
    target.parent.mkdir()
    part = download._Part(target)
    part.begin(download._Begun(server.url(), '"one"', len(CONTENT), False))
    part.path.write_bytes(CONTENT)
    fetch([server.url()], target)
    assert target.read_bytes() == CONTENT
    assert server.sent == 0
    assert only_target(target.parent)


def test_a_stalled_server(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "STALL_S", 0.3)
    release = threading.Event()

    def stall(answer: Answer) -> None:
        answer.start(200, {"Content-Length": len(CONTENT), "ETag": '"one"'})
        answer.body(CONTENT[:100_000])
        release.wait(30)

    lines: list[str] = []
    server.script = [stall]
    fetch([server.url()], target, note=lines.append)
    release.set()
    assert target.read_bytes() == CONTENT
    assert server.asked[1][1] == "bytes=100000-"
    assert "no data for 0.3 s after 97.7 KiB" in lines[0]


def test_a_server_that_drips(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "STALL_S", 0.5)
    release = threading.Event()

    def drip(answer: Answer) -> None:
        answer.start(200, {"Content-Length": len(CONTENT)})
        for index in range(200):
            answer.body(CONTENT[index : index + 1])
            if release.wait(0.05):
                break

    server.script = [drip] * 9
    text = refused(server.url(), target=target)
    release.set()
    assert "fewer than 256 bytes/s" in text


def test_a_process_that_was_killed_is_continued(server: Server, target: Path) -> None:
    halfway, release = threading.Event(), threading.Event()

    def half(answer: Answer) -> None:
        answer.start(200, {"Content-Length": len(CONTENT), "ETag": '"one"'})
        answer.body(CONTENT[:200_000])
        halfway.set()
        release.wait(30)

    server.script = [half]
    code = (
        f"from pathlib import Path; from svp_bench.prepare.download import fetch; "
        f"fetch([{server.url()!r}], Path({str(target)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    assert halfway.wait(60)
    part = target.with_name(".data.bin.part")
    wait_for(lambda: part.is_file() and part.stat().st_size == 200_000)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    release.set()
    assert not target.exists()
    fetch([server.url()], target)
    assert target.read_bytes() == CONTENT
    assert server.sent == len(CONTENT)


def test_two_processes_download_once(server: Server, target: Path) -> None:
    """Here two threads: the lock is one of files, so they exclude each other as processes do."""
    lines: list[str] = []
    both = threading.Barrier(2, timeout=30)

    def slow(answer: Answer) -> None:
        wait_for(lambda: lines, 30)
        answer.serve()

    def run(_: int) -> bytes:
        both.wait()
        return fetch([server.url()], target, note=lines.append).read_bytes()

    server.script = [slow]
    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(run, range(2))] == [CONTENT, CONTENT]
    assert len(server.asked) == 1
    assert lines == ["data.bin: another process downloads it; waiting"]


# ---- refused


def test_busy_servers(server: Server, target: Path, waits: list[float]) -> None:
    later = formatdate(time.time() + 50, usegmt=True)
    server.script = [status(500), status(500), status(429, Retry_After=3), status(503, Retry_After=later)]
    fetch([server.url()], target)
    assert waits[:3] == [0.5, 1.0, 3.0]
    assert 40 < waits[3] <= 50
    assert target.read_bytes() == CONTENT


def test_a_server_that_wants_hours(servers: Callable[[], Server], target: Path, waits: list[float]) -> None:
    busy, mirror = servers(), servers()
    busy.script = [status(429, Retry_After=86400)]
    fetch([busy.url(), mirror.url()], target)
    assert waits == []
    busy.script = [status(429, Retry_After=86400)]
    target.unlink()
    assert "429 Too Many Requests, and asks to wait 86400 s" in refused(busy.url(), target=target)


def test_dead_links_are_named_with_their_reasons(
    servers: Callable[[], Server], target: Path, waits: list[float]
) -> None:
    gone, broken, closed = servers(), servers(), servers()
    gone.script, broken.script = [status(404)], [status(500)] * 9
    closed.shutdown()
    closed.server_close()
    secret = gone.url("data.bin?token=geheim").replace("http://", "http://user:geheim@")
    text = refused(secret, broken.url(), closed.url(), "ftp://127.0.0.1/data.bin", target=target)
    for part in (
        f"{gone.url()}: 404 Not Found",
        f"{broken.url()}: 500 Internal Server Error ({download.ATTEMPTS} attempts)",
        f"{closed.url()}: connection refused",
        "ftp://127.0.0.1/data.bin: not an http or https address",
        "--mirror",
        "--from",
    ):
        assert part in text
    assert "geheim" not in text
    assert len(gone.asked) == 1


def test_an_unknown_host(target: Path) -> None:
    assert "unknown host" in refused("http://no-such-host.invalid/data.bin", target=target)


def test_a_web_page_instead_of_the_file(server: Server, target: Path) -> None:
    def page(answer: Answer) -> None:
        answer.start(200, {"Content-Type": "text/html; charset=utf-8", "Content-Length": 6})
        answer.body(b"<html>")

    server.script = [page]
    assert "a web page instead of the file" in refused(server.url(), target=target)


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("/again", "redirected more than 10 times"),
        ("file:///etc/passwd", "redirects to an address that is not http or https"),
        ("http://[broken/", "nvalid"),
    ],
)
def test_redirects_that_lead_nowhere(server: Server, target: Path, location: str, reason: str) -> None:
    server.script = [status(302, Location=location)] * 50
    assert reason in refused(server.url(), target=target)


def test_a_redirect_to_the_file(servers: Callable[[], Server], target: Path) -> None:
    first, second = servers(), servers()
    first.script = [status(302, Location=second.url("elsewhere"))]
    fetch([first.url()], target, digest=DIGEST)
    assert target.read_bytes() == CONTENT


# ---- lies


def test_a_server_that_claims_more_than_it_has(server: Server, target: Path) -> None:
    server.script = [lambda answer: answer.serve(claimed=400_000)] * 30
    assert "attempts" in refused(server.url(), target=target)


def test_a_length_that_is_not_the_expected_one(server: Server, target: Path) -> None:
    text = refused(server.url(), target=target, size=1000)
    assert "it has 300000 bytes there, expected 1000" in text
    assert server.sent <= len(CONTENT)


def test_more_bytes_than_expected_without_a_length(server: Server, target: Path) -> None:
    def endless(answer: Answer) -> None:
        answer.start(200, {"Connection": "close"})
        for _ in range(100):
            answer.body(CONTENT)

    server.script = [endless]
    assert "sends more than the 1000 bytes expected" in refused(server.url(), target=target, size=1000)
    assert not [*target.parent.glob(".data.bin.part*")]


def test_a_file_that_the_disk_cannot_hold(server: Server, target: Path) -> None:
    server.script = [lambda answer: answer.serve(claimed=2**60)]
    text = refused(server.url(), target=target)
    assert f"needs {2**60 // 2**40}.0 TiB" in text or "TiB" in text
    assert "are free" in text


def test_a_wrong_digest_takes_the_next_mirror(servers: Callable[[], Server], target: Path) -> None:
    wrong, right = servers(), servers()
    wrong.content = CONTENT[:-1] + b"!"
    text = refused(wrong.url(), target=target, digest=DIGEST)
    assert f"expected {DIGEST}" in text
    assert len(wrong.asked) == 1
    assert not [*target.parent.glob(".data.bin.part*")]
    fetch([wrong.url(), right.url()], target, digest=DIGEST)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["data.bin", "data.tar.gz"])
def test_an_encoding_that_was_not_asked_for(server: Server, tmp_path: Path, name: str) -> None:
    """A file of that form keeps it; any other is decoded."""
    packed = gzip.compress(CONTENT)

    def encoded(most: int | None = None) -> Callable[[Answer], None]:
        def answer_it(answer: Answer) -> None:
            answer.start(200, {"Content-Encoding": "gzip", "Content-Length": len(packed), "ETag": '"one"'})
            answer.body(packed[:most])
            answer.close_connection = True

        return answer_it

    server.script = [encoded(1000), encoded()]
    found = fetch([server.url()], tmp_path / name).read_bytes()
    assert found == (packed if name.endswith(".gz") else CONTENT)
    assert [asked for _, asked in server.asked] == [None, None]


def test_an_answer_without_a_length_is_taken_with_a_warning(server: Server, target: Path) -> None:
    def unstated(answer: Answer) -> None:
        answer.start(200, {"Connection": "close"})
        answer.body(CONTENT)
        answer.close_connection = True

    lines: list[str] = []
    server.script = [unstated]
    fetch([server.url()], target, note=lines.append)
    assert target.read_bytes() == CONTENT
    assert "cannot be checked" in lines[-1]


def test_chunked_answers_know_their_end(server: Server, target: Path) -> None:
    def chunked(end: bool) -> Callable[[Answer], None]:
        def answer_it(answer: Answer) -> None:
            answer.start(200, {"Transfer-Encoding": "chunked"})
            answer.wfile.write(b"%x\r\n%s\r\n" % (len(CONTENT), CONTENT) + (b"0\r\n\r\n" if end else b""))
            answer.close_connection = True

        return answer_it

    lines: list[str] = []
    server.script = [chunked(False), chunked(True)]
    fetch([server.url()], target, note=lines.append)
    assert target.read_bytes() == CONTENT
    assert ["cut" in line for line in lines] == [True]


def test_a_target_that_cannot_be_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be written"):
        fetch([server.url()], tmp_path / "file" / "data.bin")
    (tmp_path / "data.bin").mkdir()
    with pytest.raises(DataError, match=r"is not a file; move it away"):
        fetch([server.url()], tmp_path / "data.bin")
    with pytest.raises(UsageError, match=r"no address of gone\.bin is known"):
        fetch([], tmp_path / "gone.bin")

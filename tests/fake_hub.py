"""A Hugging Face hub on loopback, as much of it as the real client needs for looking up and downloading."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


class Hub(ThreadingHTTPServer):
    """Repositories by commit.

    Attributes:
        repositories: "datasets/owner/name" or "models/owner/name" → commit → path → content; the last commit is main.
        cards: Repository → metadata of its README.
        asked: Method and path of each request.
        sent: Bytes of files.
        failing: Statuses that the next requests get.
        cut: Bytes after which the next file is cut off, once; None for none.
        hold: If set, the first half of a file is sent, and the rest after this event.
        wrong: Path of a file → bytes that are sent in place of its content.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Page)
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.cards: dict[str, Any] = {}
        self.asked: list[str] = []
        self.sent = 0
        self.failing: list[int] = []
        self.cut: int | None = None
        self.hold: threading.Event | None = None
        self.wrong: dict[str, bytes] = {}
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, name: str, files: dict[str, bytes], commit: str = "c0ffee" + "0" * 34, kind: str = "datasets") -> str:
        self.repositories.setdefault(f"{kind}/{name}", {})[commit] = files
        return commit

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients hang up


class _Page(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        if self.server.failing:
            self.reply(self.server.failing.pop(0), b"")
            return None
        if match := re.fullmatch(r"/api/((?:datasets|models)/[^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            return self.info(match[1], match[2])
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(f"{match[1] or 'models/'}{match[2]}", match[3], match[4])
        if match := re.fullmatch(r"/files/((?:datasets|models)/[^/]+/[^/]+)/([0-9a-f]{40})/(.+)", path):
            return self.file(match[3], self.server.repositories[match[1]][match[2]][match[3]])
        return self.reply(404, b"")

    def commit(self, name: str, revision: str | None) -> str | None:
        """Return the commit of a revision; None after an answer that there is none."""
        commits = self.server.repositories.get(name, {})
        found = [*commits][-1] if commits and revision in (None, "main") else revision
        if found not in commits:
            self.reply(404, b"", {"X-Error-Code": "RevisionNotFound" if commits else "RepoNotFound"})
        return found if found in commits else None

    def info(self, name: str, revision: str | None) -> None:
        if (commit := self.commit(name, revision)) is None:
            return
        siblings = [
            {
                "rfilename": path,
                "size": len(content),
                "blobId": "0" * 40,
                "lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130},
            }
            for path, content in self.server.repositories[name][commit].items()
        ]
        card = self.server.cards.get(name)
        stated = {"id": name.partition("/")[2], "sha": commit, "siblings": siblings, "private": False, "tags": []}
        stated |= {"downloads": 0, "likes": 0}
        stated |= {"cardData": card} if card else {}
        self.reply(200, json.dumps(stated).encode(), {"Content-Type": "application/json"})

    def resolve(self, name: str, revision: str, path: str) -> None:
        if (commit := self.commit(name, revision)) is None:
            return None
        content = self.server.repositories[name][commit].get(path)
        if content is None:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return None
        return self.reply(
            302,  # the large files of the hub lie elsewhere
            b"",
            {
                "Location": f"http://localhost:{self.server.server_address[1]}/files/{name}/{commit}/{path}",
                "X-Repo-Commit": commit,
                "X-Linked-Size": str(len(content)),
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
            },
        )

    def file(self, path: str, content: bytes) -> None:
        content = self.server.wrong.get(path, content)
        status, headers = 200, {}
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or ""):
            begin = int(match[1])
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            status, content = 206, content[begin:]
        if self.command == "GET" and self.server.cut is not None:
            most, self.server.cut = self.server.cut, None
            self.close_connection = True
            self.reply(status, content, headers, most)
            return None
        return self.reply(status, content, headers)

    def reply(
        self, status: int, content: bytes, headers: dict[str, str] | None = None, most: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            half = len(content) // 2 if content and self.server.hold else 0
            for piece in (content[:half], content[half:most]):
                self.wfile.write(piece)
                self.wfile.flush()
                self.server.sent += len(piece)
                if piece and self.server.hold:
                    self.server.hold.wait(60)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def settle_client(monkeypatch: pytest.MonkeyPatch, cache: str, endpoint: str) -> None:
    """Point the client of this process and of subprocesses to a hub and a cache."""
    from huggingface_hub import constants

    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_HUB_CACHE", cache)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

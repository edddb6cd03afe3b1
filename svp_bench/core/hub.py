"""Files of repositories on the Hugging Face hub: at one commit, checked against the size and digest that it states.

The hub's own client downloads, retries and resumes, into its own cache. `HF_ENDPOINT`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE`
and `HF_TOKEN` mean what they mean to it.
"""

from __future__ import annotations

import importlib
import os
import re
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from svp_bench.core.atomic import file_digest
from svp_bench.core.errors import file_size, plural, printable
from svp_bench.core.terminal import has_width

Kind = Literal["dataset", "model"]
TIMEOUT_S = 10.0  # of a connection, and of a question about a repository
COMMIT = re.compile(r"[0-9a-f]{40}")


class HubError(Exception):
    """A repository or file cannot be had; the text is the reason, in one line."""


@dataclass(frozen=True)
class HubFile:
    """A file of a repository; size in bytes and SHA-256 (64 digits) where the hub states them."""

    path: str
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class HubRepository:
    """A repository at one commit.

    Attributes:
        name: "owner/name".
        kind: "dataset" or "model".
        revision: The commit.
        endpoint: Address of the hub that has it.
        files: Its files; offline, those that were downloaded before.
        card: The metadata at the head of its README; empty while offline.
    """

    name: str
    kind: Kind
    revision: str
    endpoint: str
    files: tuple[HubFile, ...]
    card: dict[str, Any]


def default_endpoint() -> str:
    """Return the address of the hub: $HF_ENDPOINT, else the public one."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def is_offline() -> bool:
    """Whether the environment forbids the hub's client to use the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def look_up(
    name: str, kind: Kind, *, revision: str | None = None, endpoints: Sequence[str] = (), offline: bool = False
) -> HubRepository:
    """Find a repository at one commit; no file is downloaded.

    Args:
        name: "owner/name".
        kind: "dataset" or "model".
        revision: A commit, branch or tag; the newest commit by default.
        endpoints: Addresses of hubs, tried in turn; `default_endpoint` by default.
        offline: Look into the local cache only.

    Raises:
        HubError: If there is none.
    """
    if offline:
        return _cached(name, kind, revision)
    from huggingface_hub import HfApi

    reasons = []
    for endpoint in endpoints or (default_endpoint(),):
        try:
            check_connection(endpoint)
            info: Any = HfApi(endpoint=endpoint.rstrip("/")).repo_info(
                name, repo_type=kind, revision=revision, files_metadata=True, timeout=TIMEOUT_S
            )
        except Exception as error:  # the hub's client raises many kinds
            reasons.append(f"{endpoint}: {hub_reason(error)}")
            continue
        if not COMMIT.fullmatch(str(info.sha)):
            reasons.append(f"{endpoint}: states no commit")
            continue
        files = [_file(sibling) for sibling in info.siblings or ()]
        card = info.card_data.to_dict() if info.card_data is not None else {}
        return HubRepository(name, kind, info.sha, endpoint.rstrip("/"), tuple(files), card)
    raise HubError("; ".join(reasons))


def _file(sibling: Any) -> HubFile:
    lfs = sibling.lfs
    sha256 = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)  # a dict in old versions
    return HubFile(sibling.rfilename, sibling.size, sha256)


def _cached(name: str, kind: Kind, revision: str | None) -> HubRepository:
    from huggingface_hub import constants, scan_cache_dir

    cache = Path(constants.HF_HUB_CACHE)
    repos = scan_cache_dir(cache).repos if cache.is_dir() else ()
    found = [commit for repo in repos if (repo.repo_id, repo.repo_type) == (name, kind) for commit in repo.revisions]
    if revision is not None:
        found = [one for one in found if revision == one.commit_hash or revision in one.refs]
    elif len(found) > 1:
        found = [one for one in found if "main" in one.refs]
    if len(found) != 1:
        at = f" at {revision}" if revision else ""
        raise HubError(f"{name}{at} is not in the hub's cache {cache}, and the network is not to be used")
    files = [
        HubFile(file.file_path.relative_to(found[0].snapshot_path).as_posix(), file.size_on_disk)
        for file in found[0].files
    ]
    return HubRepository(name, kind, found[0].commit_hash, default_endpoint(), tuple(files), {})


def download(repository: HubRepository, file: HubFile, *, offline: bool = False) -> Path:
    """Return a file of a repository in the hub's cache, downloaded if it is not there, and checked.

    Raises:
        HubError: If it cannot be downloaded, or has another size or digest than stated; it is then deleted.
    """
    from huggingface_hub import hf_hub_download

    client: Any = importlib.import_module("huggingface_hub.utils")
    if not has_width(sys.stderr):
        client.disable_progress_bars()
    client.logging.set_verbosity_error()  # no warnings about retries
    try:
        found = Path(
            hf_hub_download(
                repository.name,
                file.path,
                repo_type=repository.kind,
                revision=repository.revision,
                endpoint=repository.endpoint,
                etag_timeout=TIMEOUT_S,
                local_files_only=offline,
            )
        )
    except Exception as error:  # the hub's client raises many kinds
        raise HubError(f"{repository.endpoint}: {file.path}: {hub_reason(error)}") from None
    blob = found.resolve()
    expected = file.sha256 or (blob.name if re.fullmatch(r"[0-9a-f]{64}", blob.name) else None)
    size = blob.stat().st_size
    problem = None
    if file.size is not None and size != file.size:
        problem = f"has {size} bytes, the hub states {file.size}"
    elif expected and (actual := file_digest(blob)) != f"sha256:{expected}":
        problem = f"has the digest {actual}, the hub states sha256:{expected}"
    if problem is not None:
        for path in (found, blob):
            path.unlink(missing_ok=True)
        raise HubError(f"{file.path} of {repository.name} {problem}; the file is deleted, run the command again")
    return found


def check_connection(endpoint: str) -> None:
    """Fail at once without a connection to a hub; its client retries for more than 20 s.

    Raises:
        OSError: If there is none, or the environment forbids it.
        HubError: If it is not an address.
    """
    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy")):
        return
    if is_offline():
        raise ConnectionError("HF_HUB_OFFLINE is set")
    url = urlsplit(endpoint)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise HubError("not the http or https address of a hub")
    socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), TIMEOUT_S).close()


def hub_reason(error: Exception) -> str:
    """Return the cause of an error of the hub's client in a few words."""
    if isinstance(error, HubError):
        return str(error)
    kinds = {kind.__name__ for kind in type(error).__mro__}  # which lie in other modules in other versions
    for kind, reason in (
        ("GatedRepoError", "the repository needs consent: accept its terms on its page and set HF_TOKEN"),
        ("RepositoryNotFoundError", "no such repository, or a private one (HF_TOKEN)"),
        ("RevisionNotFoundError", "no such revision"),
        ("LocalEntryNotFoundError", "not in the hub's cache, and the hub cannot be reached"),
        ("EntryNotFoundError", "no such file"),
        ("HFValidationError", "not the name of a repository"),
    ):
        if kind in kinds:
            return reason
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return f"status {status}"
    text = (printable(str(error).strip()).split("\\n")[0] or "").split(". ")[0].rstrip(".")
    return f"{type(error).__name__}: {text[:160]}"


def describe_files(files: Sequence[HubFile]) -> str:
    """Return "3 files, 1.2 GiB" for a message; without the size if one is not known."""
    count = plural(len(files), "file")
    sizes = [file.size for file in files if file.size is not None]
    return f"{count}, {file_size(sum(sizes))}" if len(sizes) == len(files) else count

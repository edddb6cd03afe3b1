"""Published weights: downloaded at a pinned commit, checked, and slimmed to their tensors as .safetensors.

A published file of Vim holds optimizer state and an EMA copy next to the weights, four times their size. The slim file
has the tensors that `load_checkpoint` would read from it, under the same names, with the head: from `model` or
`state_dict`, from `model_ema` only where there is no other. It lies in the cache folder as `NAME-<digest>.safetensors`
next to its pin, a JSON file with the commit and the digests of both files, which later downloads must have.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save

from svp_bench.core import resources
from svp_bench.core.atomic import file_digest, read_regular, replacing
from svp_bench.core.errors import CheckpointError, unknown_name
from svp_bench.core.hub import (
    COMMIT,
    HubError,
    HubFile,
    HubRepository,
    check_connection,
    default_endpoint,
    download,
    hub_reason,
    is_offline,
)
from svp_bench.core.validate import convert
from svp_bench.models.weight_files import GRID_KEY, by, read_weights

# Repository → commit that `hub` stands for. Others: the newest commit at the first use.
REVISIONS = {
    "hustvl/Vim-small-midclstok": "babc4440f5fab6e08d97e371afa639c8cf98bf2c",
    "hustvl/Vim-tiny-midclstok": "07c00e0e4ea2973d8e343afdd807128a57bc9fd5",
}
# File → digest, from two files of one other repository that uses it; the publisher states none.
STATED_DIGESTS = {
    "vim_s_midclstok_80p5acc.pth": "sha256:aae4583e2def6389b66cfaf292cfade47a873182a39adbec19ec55b730ea9fe3",
}
_REMEDY = (
    "if that is the file you mean, pass it as --model.checkpoint PATH, or run `svp-bench data weights` with --digest"
)


@dataclass(frozen=True)
class Pin:
    """What was downloaded and slimmed.

    Attributes:
        repository: "owner/name" on the hub.
        file: The published file.
        revision: Its commit.
        digest: "sha256:…" of the published file.
        size: Its size in bytes.
        weights: Name of the slim file.
        weights_digest: "sha256:…" of the slim file.
        checked: Where the expected digest of the published file came from: "stated" in this package, "given" by the
            user, or "first use" if none was known, so that this one is expected from now on.
    """

    repository: str
    file: str
    revision: str
    digest: str
    size: int
    weights: str
    weights_digest: str
    checked: str


def published_file(architecture: str) -> tuple[str, str]:
    """Return the repository and file of an architecture's published weights.

    Raises:
        CheckpointError: If none are known.
    """
    from timm.models import get_pretrained_cfg, is_model

    try:
        cfg = get_pretrained_cfg(architecture, allow_unregistered=False) if is_model(architecture) else None
    except RuntimeError:  # an unknown tag behind the dot
        cfg = None
    if cfg is None or not cfg.hf_hub_id:
        raise CheckpointError(
            f"no published checkpoint of {architecture} is known; use --model.checkpoint PATH, embedded or none"
        )
    return cfg.hf_hub_id, cfg.hf_hub_filename or "model.safetensors"  # as timm publishes its own


def known_architecture(name: str) -> str:
    """Return the architecture of a name such as vim_small or vim_small_patch16_224.

    Raises:
        UsageError: If there is none.
    """
    import timm

    import svp_bench.models  # noqa: F401  # registers Vim and Mamba-Reg

    base, _, tag = name.partition(".")
    found = next((one for one in (base, f"{base}_patch16_224") if timm.is_model(one) and _is_backbone(one)), None)
    if found is not None and tag:
        tagged = timm.list_pretrained(f"{found}.*")
        if f"{found}.{tag}" not in tagged:
            raise unknown_name("checkpoint", f"{found}.{tag}", tagged)
        return f"{found}.{tag}"
    if found is None:
        known = timm.list_models(["vim_*", "mambar_*", "deit_*", "vit_small_*"])
        raise unknown_name("backbone", name, [*known, *(one.removesuffix("_patch16_224") for one in known)])
    return found


def _is_backbone(architecture: str) -> bool:
    """Return whether a timm model is of a family that has the `Backbone` interface."""
    from timm.models import model_entrypoint

    module = model_entrypoint(architecture).__module__
    return module.startswith("svp_bench.") or module in ("timm.models.vision_transformer", "timm.models.deit")


def fetch_weights(
    architecture: str, *, revision: str | None = None, digest: str | None = None, offline: bool = False
) -> tuple[Path, Pin | None]:
    """Return the slim file of an architecture's published weights, downloaded and slimmed if it is not there.

    Args:
        architecture: timm name, e.g. "vim_small_patch16_224".
        revision: Commit or branch; by default the one of `REVISIONS`, else the newest at the first use.
        digest: "sha256:…" that the published file must have; by default the stated one or that of the first use.
        offline: Use no network.

    Returns:
        The file and its pin. Where the cache folder cannot be written: the published file, and None.

    Raises:
        CheckpointError: If the file cannot be downloaded, has another digest than expected, or is no weight file.
    """
    repository, file = published_file(architecture)
    revision = revision or REVISIONS.get(repository, "main")
    if not re.fullmatch(r"[\w.-]+", revision):
        raise CheckpointError(f"revision {revision!r} is neither a commit nor a branch or tag without slashes")
    if digest is not None and not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise CheckpointError(f"digest {digest!r} is not sha256: and 64 hexadecimal digits")
    try:
        return _from_cache(architecture, repository, file, revision, digest, offline)
    except OSError as error:
        container, _ = _download(architecture, repository, file, revision, offline)
        if expected := digest or STATED_DIGESTS.get(file):
            _expect(file_digest(container), expected, container, _REMEDY)
        text = f"{error.filename or 'the cache folder'} cannot be written ({error.strerror or error})"
        warnings.warn(f"{text}: the weights are read from {container}", stacklevel=2)
        return container, None


def _from_cache(
    architecture: str, repository: str, file: str, revision: str, digest: str | None, offline: bool
) -> tuple[Path, Pin]:
    """Return the slim file and its pin; OSError if the cache folder cannot be written."""
    try:
        place = resources.cache_dir("weights") / f"{architecture}@{revision}.json"
    except RuntimeError as error:
        raise OSError(str(error)) from None
    if found := _slim_file(place, (repository, file), digest):
        return found
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_name(f".{place.name}.lock")):
        if found := _slim_file(place, (repository, file), digest):  # another process was faster
            return found
        for left in place.parent.glob(f".{place.stem}.*.tmp"):  # of a process that was killed
            left.unlink()
        pin = _read_pin(place, (repository, file))
        container, commit = _download(architecture, repository, file, pin.revision if pin else revision, offline)
        return _slim(architecture, container, place, (repository, file, commit), pin, digest)


def _slim_file(place: Path, source: tuple[str, str], digest: str | None) -> tuple[Path, Pin] | None:
    """Return the slim file that a pin names, checked; None if there is none."""
    pin = _read_pin(place, source)
    if pin is None or not (slim := place.with_name(pin.weights)).exists():
        return None
    _expect(file_digest(slim), pin.weights_digest, slim, "delete it, and it is written again")
    _expect(pin.digest, digest or pin.digest, place, "delete the pin to take another file")
    return slim, pin


def _read_pin(path: Path, source: tuple[str, str]) -> Pin | None:
    """Return the pin of a published file; None if there is none, or one of another file."""
    try:
        content = json.loads(read_regular(path, 2**16))
    except FileNotFoundError:
        return None
    except ValueError:
        raise CheckpointError(
            f"{path}: not JSON; delete it, and the weights are downloaded and checked again"
        ) from None
    pin: Pin = convert(content, Pin, str(path), CheckpointError, "the pin")
    if not re.fullmatch(r"[\w.@-]+\.safetensors", pin.weights):
        raise CheckpointError(f"{path}: weights {pin.weights!r} is not the name of a .safetensors file")
    return pin if (pin.repository, pin.file) == source else None


def _slim(
    architecture: str, container: Path, place: Path, origin: tuple[str, str, str], pin: Pin | None, given: str | None
) -> tuple[Path, Pin]:
    """Check a published file, and write its tensors and its pin."""
    repository, file, commit = origin
    actual = file_digest(container)
    stated = STATED_DIGESTS.get(file)
    expected = given or (pin.digest if pin else None) or stated
    _expect(actual, expected or actual, container, _REMEDY)
    checked = "given" if given else pin.checked if pin else "stated" if stated else "first use"
    weights = read_weights(container)
    tensors = {name: value.detach().clone().contiguous() for name, value in weights.tensors.items()}
    if not _is_of(architecture, tensors):  # or a later download of the right file would be refused
        raise CheckpointError(
            f"{file} of {repository} at {commit} holds {', '.join([*tensors][:3])} …, not the tensors of "
            f"{architecture}: it was not pinned; give another --revision, or the file as --model.checkpoint PATH"
        )
    content = save(tensors, metadata={GRID_KEY: by(weights.grid)} if weights.grid else None)
    temporary = place.with_suffix(".safetensors")
    with replacing(temporary) as out:
        out.write(content)
    slim_digest = file_digest(temporary)
    slim = place.with_name(f"{architecture}-{slim_digest.partition(':')[2][:8]}.safetensors")
    temporary.replace(slim)
    size = container.stat().st_size
    new = Pin(repository, file, commit, actual, size, slim.name, slim_digest, checked)
    with replacing(place) as out:
        out.write(json.dumps(asdict(new), indent=2).encode() + b"\n")
    return slim, new


def _is_of(architecture: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Return whether most tensors have names and shapes of an architecture; `load_checkpoint` checks the rest."""
    import timm

    with torch.device("meta"):
        model = timm.create_model(architecture, pretrained=False)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    fitting = [name for name, value in tensors.items() if shapes.get(name) == value.shape]
    return 2 * len(fitting) > len(tensors)


def _expect(actual: str, expected: str, path: Path, remedy: str) -> None:
    if actual != expected:
        raise CheckpointError(f"{path}: its digest is {actual}, expected {expected}; {remedy}")


def _download(architecture: str, repository: str, file: str, revision: str, offline: bool) -> tuple[Path, str]:
    """Return the published file in the hub's cache, and its commit."""
    from huggingface_hub import try_to_load_from_cache

    endpoint = default_endpoint()
    cached = try_to_load_from_cache(repository, file, revision=revision)
    known = isinstance(cached, str)
    offline = offline or is_offline() or (known and COMMIT.fullmatch(revision) is not None)
    try:
        if offline and not known:
            raise HubError("HF_HUB_OFFLINE is set" if is_offline() else "--offline allows no download")
        if not offline:
            try:
                check_connection(endpoint)
            except Exception:
                if not known:
                    raise
                offline = True  # the branch as it was when it was downloaded
        found = download(HubRepository(repository, "model", revision, endpoint, (), {}), HubFile(file), offline=offline)
    except Exception as error:  # the hub's client raises many kinds
        raise CheckpointError(
            f"cannot get the weights of {architecture}: {repository} at {revision} is not in the local hub cache, and "
            f"{endpoint} failed ({hub_reason(error)}); download https://huggingface.co/{repository}/resolve/{revision}/"
            f"{file} elsewhere and pass --model.checkpoint PATH, or take the weights in the package (--model.backbone "
            "vim_nano_patch8_64 --model.checkpoint embedded), or --model.checkpoint none for random weights"
        ) from None
    commit = found.parts[-1 - len(Path(file).parts)]  # …/snapshots/<commit>/<file>
    return found, commit if COMMIT.fullmatch(commit) else revision

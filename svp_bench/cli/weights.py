"""The subcommand `data weights`."""

from __future__ import annotations


def weights(
    names: tuple[str, ...], /, *, revision: str | None = None, digest: str | None = None, offline: bool = False
) -> int:
    """Download published weights, check them, and keep their tensors for `--model.checkpoint hub`.

    Args:
        names: Backbones, e.g. vim_small, mambar_small_patch16_224 or deit_small.
        revision: Commit, branch or tag of the repository; the pinned commit, else the newest, by default.
        digest: sha256:… that the published file must have.
        offline: Use no network; take what was downloaded before.
    """
    from svp_bench.core.errors import UsageError, file_size
    from svp_bench.core.registry import importing_torch

    with importing_torch():
        from svp_bench.models.hub_weights import fetch_weights, known_architecture

    if not names:
        raise UsageError("name at least one backbone, e.g. `svp-bench data weights vim_small`")
    if digest is not None and len(names) > 1:
        raise UsageError("--digest is that of one file; name one backbone")
    for architecture in [known_architecture(name) for name in names]:
        path, pin = fetch_weights(architecture, revision=revision, digest=digest, offline=offline)
        if pin is None:
            print(f"{architecture}: {path} (as published; the cache folder cannot be written)")
            continue
        checks = {
            "stated": "as stated by a third party; the publisher states none",
            "given": "as given",
            "first use": "pinned at the first use: none was known, and later downloads must have it",
        }
        sizes = f"{file_size(path.stat().st_size)} of {file_size(pin.size)}"
        print(f"{architecture}: {path} ({sizes})")
        print(
            f"  {pin.file} of {pin.repository} at {pin.revision}, {pin.digest} ({checks.get(pin.checked, pin.checked)})"
        )
        use = f"--model.checkpoint {path}" if revision else "--model.checkpoint hub"
        print(f"  {use} reads this file")
    return 0

"""Create the shipped weights from finished pre-training runs.

    python -m pretraining.export runs/pretraining/vim_nano_patch8_64/seed-0 runs/pretraining/vim_nano_patch8_64/seed-1

Rule, fixed before the runs: of the given runs, which differ in their seed alone, the one with the lowest final held-out
total is shipped. That is the loss on synthetic images that no run has trained on; no evaluation task is used. Writes
the backbone (no heads) as safetensors under the published parameter names, and copies log, loss curve and summary of
every run to results/<backbone>/ in this folder, with the contact sheet of the shipped one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from pretraining.train import CHECKPOINT, SUMMARY
from svp_bench.core.errors import CheckpointError, SvpBenchError, UsageError
from svp_bench.methods.build import create_backbone
from svp_bench.models.checkpoints import backbone_digest, load_checkpoint
from svp_bench.models.weight_files import load_pickle_safely
from svp_bench.records.store import read_json, write_atomically

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("log.csv", "held_out.csv", "curve.png", SUMMARY)
MOST_BYTES = 4 * 1000**2


def weights_of(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the backbone's float32 tensors of a finished run, under the published names, and the run's summary.

    Raises:
        UsageError: If the run is not finished.
        CheckpointError: If its checkpoint is damaged or not that of its summary.
    """
    if not (folder / SUMMARY).is_file() or not (folder / CHECKPOINT).is_file():
        raise UsageError(f"{folder} holds no finished pre-training; run python -m pretraining.train --folder {folder}")
    summary: dict[str, Any] = read_json(folder / SUMMARY, str(folder / SUMMARY))
    saved = load_pickle_safely(folder / CHECKPOINT)
    state = {
        name.removeprefix("model."): value.to(torch.float32).contiguous()
        for name, value in saved["state_dict"].items()
        if name.startswith("model.")
    }
    model: Any = create_backbone(summary["settings"]["backbone"], num_classes=1, checkpoint="none")
    model.reset_classifier(0)
    model.load_state_dict(state)
    if backbone_digest(model) != summary["weights"]:
        raise CheckpointError(f"{folder}: {CHECKPOINT} does not match {SUMMARY}; train it again")
    return state, summary


def better(summaries: Sequence[dict[str, Any]]) -> int:
    """Return the index of the shipped run: the lowest final held-out total, the first of equal ones.

    Raises:
        UsageError: If they differ in more than the seed.
    """
    without = [{k: v for k, v in s["settings"].items() if k != "seed"} for s in summaries]
    measured = [(s["held_out_seed"], s["held_out_images"], s["drawing"]) for s in summaries]
    if any(other != without[0] for other in without) or len(set(measured)) > 1:
        raise UsageError("the runs differ in more than their seed; only seeds of one setting are compared")
    return min(range(len(summaries)), key=lambda n: float(summaries[n]["held_out"]["total"]))


def export(folders: Sequence[Path], embedded: Path, results: Path) -> Path:
    """Ship the better run; return the file of the weights.

    Args:
        folders: Finished runs.
        embedded: Folder for `<backbone>.safetensors`.
        results: Folder for `<backbone>/` with the logs of the runs and `shipped.json`.

    Raises:
        UsageError: If a run is not finished, or they do not belong together.
        CheckpointError: If a checkpoint is damaged, or the file would be larger than 4 MB.
    """
    runs = [weights_of(folder) for folder in folders]
    selected = better([summary for _, summary in runs])
    state, summary = runs[selected]
    backbone = summary["settings"]["backbone"]
    content = save(state, metadata={"weights": summary["weights"]})  # one entry: more have no fixed order
    if len(content) > MOST_BYTES:
        raise CheckpointError(f"{backbone} would take {len(content):,} bytes; at most {MOST_BYTES:,} may be shipped")
    path = embedded / f"{backbone}.safetensors"
    embedded.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.safetensors")
    try:
        temporary.write_bytes(content)
        model = create_backbone(backbone, num_classes=1, checkpoint="none")
        load_checkpoint(model, temporary)  # strict
        if backbone_digest(model) != summary["weights"]:
            raise CheckpointError(f"{path}: the weights read back are not those written")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    for folder, (_, one) in zip(folders, runs, strict=True):
        target = results / backbone / f"seed-{one['settings']['seed']}"
        target.mkdir(parents=True, exist_ok=True)
        for name in COPIED:
            shutil.copyfile(folder / name, target / name)
    shutil.copyfile(folders[selected] / "images.png", results / "images.png")
    shipped = {
        "file": path.name,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "weights": summary["weights"],
        "rule": "lowest final held-out total (synthetic images, no evaluation task)",
        "seed": summary["settings"]["seed"],
        "candidates": [
            {"seed": one["settings"]["seed"], "held_out_total": one["held_out"]["total"], "weights": one["weights"]}
            for _, one in runs
        ],
    }
    write_atomically(results / backbone / "shipped.json", json.dumps(shipped, indent=2) + "\n")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m pretraining.export")
    parser.add_argument("folders", nargs="+", type=Path, help="finished runs, one for each seed")
    parser.add_argument("--embedded", type=Path, default=ROOT / "svp_bench" / "models" / "embedded")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"))
    given = parser.parse_args(arguments)
    try:
        path = export(given.folders, given.embedded, given.results)
    except SvpBenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    shipped_file = given.results / path.stem / "shipped.json"
    shipped = json.loads(shipped_file.read_text(encoding="utf-8"))
    print(f"{path}: seed {shipped['seed']}, {shipped['bytes']:,} bytes, {shipped['weights']}")
    now = Path(__file__).with_name("results") / path.stem / "shipped.json"
    if now.is_file() and now != shipped_file:
        weights = json.loads(now.read_text(encoding="utf-8"))["weights"]
        print("the same weights as those shipped" if weights == shipped["weights"] else f"those shipped are {weights}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

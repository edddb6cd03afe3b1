"""`svp-bench predict`: classify images with a trained run."""

from __future__ import annotations

import csv
import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from svp_bench.core.errors import CheckpointError, RecordError, SvpBenchError, UsageError, plural, printable
from svp_bench.data.class_folders import other_kind
from svp_bench.data.decode import Depth, UnreadableImageError, read_image
from svp_bench.data.transforms import EvalTransform
from svp_bench.records.store import csv_text, write_atomically
from svp_bench.tasks.cards import displayed_class_names, load_protocol, load_task
from svp_bench.train.checkpoint import Checkpoint, TransformMetadata
from svp_bench.train.module import AdaptationModule
from svp_bench.train.oom import AllocationFailure, explain_prediction, is_out_of_memory


def find_images(places: Sequence[str]) -> tuple[list[Path], dict[str, int]]:
    """Return the image files in `places`, and kind of other file → number of skipped files.

    Files are taken as given. Folders are searched recursively, in order, for images by content or ending; links to
    folders are not followed.

    Raises:
        UsageError: If a place does not exist, or a folder has no images.
    """
    found: list[Path] = []
    skipped: dict[str, int] = {}
    for place in map(Path, places):
        if not os.path.lexists(place):
            raise UsageError(f"no image or folder {str(place)!r}")
        if not place.is_dir():
            found.append(place)
            continue
        inside: list[Path] = []
        for file in sorted(Path(folder) / name for folder, _, names in os.walk(place) for name in names):
            try:
                kind = other_kind(file)
            except SvpBenchError:  # a dangling link, or no permission: its row has the reason
                kind = None
            if kind is None:
                inside.append(file)
            else:
                skipped[kind] = skipped.get(kind, 0) + 1
        if not inside:
            kinds = f"; skipped: {_listed(skipped)}" if skipped else ""
            raise UsageError(f"no images in {place}{kinds}")
        found += inside
    return found, skipped


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))


def run_predict(
    ckpt: str,
    places: Sequence[str],
    output: str | None,
    checkpoint: str | None,
    top: int,
    batch_size: int = 32,
    method_file: str | None = None,
) -> int:
    """Write a CSV row for each image: path, then class, name and probability of the `top` best classes, then the error.

    Classes have the names of the run, or "class 0", "class 1" … if these are unknown. The row of an image that cannot
    be read has the reason in the last column.

    Args:
        ckpt: The run's checkpoint.
        places: Images and folders of images.
        output: CSV file; standard output if None.
        checkpoint: Path of the backbone's weights, if they were moved.
        top: Number of classes in a row.
        batch_size: Images at a time.
        method_file: The file of a custom method, if its class lies next to it.

    Returns:
        The exit status: 0 if all images were read, else 1.

    Raises:
        SvpBenchError: For every error that a user can fix.
    """
    if batch_size < 1:
        raise UsageError(f"--batch_size is at least 1, not {batch_size}")
    images, skipped = find_images(places)
    saved = Checkpoint.read(ckpt)
    module = AdaptationModule.load_from_checkpoint(saved, checkpoint=checkpoint, method_file=method_file)
    about = saved.metadata
    names = about.class_names or displayed_class_names(load_task(about.task))  # older checkpoints have no names
    if len(names) != about.num_classes:
        raise CheckpointError(
            f"{ckpt}: a run of {plural(about.num_classes, 'class')}, but the card of {about.task} has {len(names)} now"
        )
    protocol = load_protocol(about.protocol)
    found = about.transform or TransformMetadata(protocol.resize, protocol.interpolation)
    depth = Depth(*found.depth)
    transform = EvalTransform(about.image_size, found.resize, found.interpolation, found.crop_ratio)
    top = min(top, module.num_classes)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"{column}{rank}" for rank in range(1, top + 1) for column in ("class", "name", "p")]
    writer.writerow(["path", *columns, "error"])
    errors: list[str] = []
    began = time.perf_counter()
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        read = [_read(path, transform, depth) for path in part]
        arrays = [one for one in read if not isinstance(one, str)]
        rows: Iterator[tuple[list[int], list[float]]] = iter(())
        failure: AllocationFailure | None = None
        try:
            if arrays:
                with torch.inference_mode():
                    best = module(torch.from_numpy(np.stack(arrays))).softmax(dim=-1).topk(top)
                rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = AllocationFailure.from_error(error)
        if failure is not None:  # not in the except clause, which would keep the error and its tensors
            raise explain_prediction(failure, module, len(arrays))
        for path, one in zip(part, read, strict=True):
            if isinstance(one, str):
                errors.append(printable(f"{path}: {one}"))
                writer.writerow([csv_text(str(path)), *[""] * len(columns), csv_text(one)])
            else:
                pairs = zip(*next(rows), strict=True)
                cells = [cell for label, p in pairs for cell in (label, csv_text(names[label]), f"{p:.4f}")]
                writer.writerow([csv_text(str(path)), *cells, ""])
    seconds = time.perf_counter() - began
    if output is None:
        sys.stdout.write(text.getvalue())
    else:
        try:
            write_atomically(Path(output), text.getvalue())
        except RecordError as error:
            raise SvpBenchError(f"{str(error).partition('; ')[0]}; choose another --output") from None
    _report(len(images), errors, skipped, output, seconds)
    return 1 if errors else 0


def _report(count: int, errors: Sequence[str], skipped: dict[str, int], output: str | None, seconds: float) -> None:
    """Print a summary; on standard error if the CSV is on standard output."""
    stream = sys.stderr if output is None else sys.stdout
    read = count - len(errors)
    where = "" if output is None else f", in {printable(output)}"
    images = "image" if count == 1 else "images"
    stream.write(f"Predicted {read:,} of {count:,} {images} ({read / max(seconds, 1e-9):.1f} images/s){where}\n")
    if skipped:
        stream.write(f"Skipped files that are not images: {_listed(skipped)}\n")
    if errors:
        more = f" (and {len(errors) - 3} more)" if len(errors) > 3 else ""
        sys.stderr.write(f"Could not read {len(errors)} of them (column error): {'; '.join(errors[:3])}{more}\n")


def _read(path: Path, transform: EvalTransform, depth: Depth) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]] | str:
    """Return an image at the size of the model, or the reason why it cannot be read."""
    try:
        return transform(read_image(path, depth).image)
    except (OSError, UnreadableImageError) as error:
        return f"not a readable image: {getattr(error, 'strerror', None) or error}"
    except Exception as error:  # of the resize, e.g. no memory for a very long and narrow image
        return f"not a readable image: {type(error).__name__}"

"""`svp-bench predict`: a trained run on pictures of one's own."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from svp_bench.cards import displayed_class_names, load_protocol, load_task
from svp_bench.data.transforms import View, to_rgb
from svp_bench.errors import CheckpointError, ConfigError, DataError, RecordError, SvpBenchError, UsageError, plural
from svp_bench.methods import METHODS
from svp_bench.methods.base import build_method
from svp_bench.results.files import write_atomically
from svp_bench.train.memory import HostGauge, Shortage, is_out_of_memory
from svp_bench.train.module import AdaptationModule
from svp_bench.train.out_of_memory import explain_prediction
from svp_bench.train.saved import SAVED_KEY, About, Saved, wrong_part

__all__ = ["load_run", "run_predict"]

_PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


def load_run(path: str | Path, checkpoint: str | None = None) -> tuple[AdaptationModule, About]:
    """Rebuild the model of a run from its checkpoint, in eval mode.

    Args:
        path: `runs/…/checkpoints/last.ckpt`.
        checkpoint: Where the backbone's weights are now, if not where the run had them.

    Returns:
        The module, and what the checkpoint says about itself.

    Raises:
        CheckpointError: If the file is no svp-bench checkpoint, is damaged, or the backbone's weights are other ones.
        UsageError: If there is no such file, or its method is not registered here.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no checkpoint {str(path)!r}; runs keep theirs in runs/<task>/<run>/checkpoints/")
    saved = Saved.read(path)
    about = saved.about
    names = {entry.target.replace(":", "."): entry.name for entry in METHODS}
    if about.method not in names:
        raise UsageError(f"{path}: its method {about.method!r} is not registered here (`svp-bench methods`)")
    name = names[about.method]
    try:
        method = build_method(METHODS.get(name), name, dict(about.method_args))
    except (TypeError, ValueError, ConfigError) as error:
        raise wrong_part(
            str(path), f"{SAVED_KEY}.method_args", dict(about.method_args), f"settings of {name} ({error})"
        ) from None
    module = AdaptationModule(
        method=method,
        backbone=about.backbone,
        checkpoint=checkpoint or about.checkpoint,
        num_classes=about.num_classes,
        image_size=about.image_size,
        seed=about.init_seed,
        head_hidden=about.head_hidden,
        input_attention=about.input_attention,  # type: ignore[arg-type]  # checked there
        ema_decay=about.ema_decay,
        ema_evaluate=about.ema_evaluate,
    )
    module.on_load_checkpoint(saved.content)
    module.load_state_dict(saved.content["state_dict"], strict=False)  # strictness is on_load_checkpoint's
    return module.eval(), about


def find_pictures(places: Sequence[str]) -> list[Path]:
    """Return the picture files among `places`: files as given, folders searched to the bottom, sorted.

    Raises:
        UsageError: If a place does not exist, or a folder holds no pictures.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            inside = sorted(p for p in place.rglob("*") if p.suffix.lower() in _PICTURES and p.is_file())
            if not inside:
                raise UsageError(f"no pictures in {place} ({', '.join(_PICTURES)})")
            found += inside
        elif place.is_file():
            found.append(place)
        else:
            raise UsageError(f"no picture or folder {str(place)!r}")
    return found


def run_predict(
    ckpt: str, places: Sequence[str], output: str | None, checkpoint: str | None, top: int, batch_size: int = 32
) -> int:
    """Write one CSV row a picture: path, then class, name and probability of the `top` best classes.

    The classes are called as in the run; where nobody knows their names, "class 0", "class 1" …

    Args:
        ckpt: The run's checkpoint.
        places: Pictures and folders of pictures.
        output: CSV file; standard output if None.
        checkpoint: Where the backbone's weights are now, if not where the run had them.
        top: How many classes a row names.
        batch_size: Pictures at a time.

    Returns:
        The exit status.

    Raises:
        SvpBenchError: For everything that a user can mend.
    """
    if batch_size < 1:
        raise UsageError(f"--batch_size is at least 1, not {batch_size}")
    pictures = find_pictures(places)
    module, about = load_run(ckpt, checkpoint)
    names = about.class_names or displayed_class_names(load_task(about.task))  # older checkpoints do not say
    if len(names) != about.num_classes:
        raise CheckpointError(
            f"{ckpt}: a run of {plural(about.num_classes, 'class')}, but the card of {about.task} has {len(names)} now"
        )
    protocol = load_protocol(about.protocol)
    seen = about.view or {"resize": protocol.resize, "interpolation": protocol.interpolation}
    view = View(about.image_size, **seen)
    top = min(top, module.num_classes)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", *(f"{column}{rank}" for rank in range(1, top + 1) for column in ("class", "name", "p"))])
    gauge = HostGauge()
    for start in range(0, len(pictures), batch_size):
        part = pictures[start : start + batch_size]
        shortage: Shortage | None = None
        try:
            images = torch.from_numpy(np.stack([_read(path, view) for path in part]))
            with torch.inference_mode():
                best = module(images).softmax(dim=-1).topk(top)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            shortage = Shortage.told_by(error)
        if shortage is not None:  # out of the clause, which keeps what it has caught
            raise explain_prediction(module, gauge, len(part), "--batch_size", shortage)
        for path, values, classes in zip(part, best.values.tolist(), best.indices.tolist(), strict=True):
            row = zip(classes, values, strict=True)
            writer.writerow([path, *_cells(row, names)])
    if output is None:
        sys.stdout.write(text.getvalue())
    else:
        try:
            write_atomically(Path(output), text.getvalue())
        except RecordError as error:
            raise SvpBenchError(f"{str(error).partition('; ')[0]}; choose another --output") from None
    return 0


def _cells(row: Iterator[tuple[int, float]], names: Sequence[str]) -> Iterator[str]:
    for label, p in row:
        yield from (str(label), names[label], f"{p:.4f}")


def _read(path: Path, view: View) -> np.ndarray[Any, np.dtype[np.uint8]]:
    try:
        with Image.open(path) as image:
            return view(to_rgb(image))
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: not a readable picture ({type(error).__name__})") from None

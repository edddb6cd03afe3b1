"""Small builders of TensorFlow Datasets with the feature names of the real ones, written to a temporary folder."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

F = tfds.features


def pixels(number: int, side: int = 6, channels: int = 3) -> np.ndarray:
    """Return an image that differs for each number."""
    return np.random.default_rng(number).integers(0, 256, (side, side, channels), dtype=np.uint8)


def encoded(array: np.ndarray, kind: str = "PNG") -> bytes:
    """Return an image file: to encode an array itself, TensorFlow Datasets needs TensorFlow."""
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(buffer, kind)
    return buffer.getvalue()


def prepare(
    data_dir: Path,
    name: str,
    version: str,
    features: dict[str, Any],
    splits: dict[str, list[dict[str, Any]]],
    config: str | None = None,
    file_format: str = "array_record",
) -> Path:
    """Write a data set in the form of TensorFlow Datasets, and return the folder of its version.

    The builder sorts examples by a hash of their keys, as it does with the real ones.
    """
    configs = [tfds.core.BuilderConfig(name=config, version=tfds.core.Version(version))] if config else []
    with tfds.core.registered.skip_registration():

        class Small(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version(version)
            BUILDER_CONFIGS = configs
            pkg_dir_path = data_dir

            def _info(self) -> Any:
                return tfds.core.DatasetInfo(builder=self, features=F.FeaturesDict(features))

            def _split_generators(self, _: Any) -> dict[str, Any]:
                return {split: self._generate_examples(examples) for split, examples in splits.items()}

            def _generate_examples(self, examples: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
                for number, example in enumerate(examples):
                    files = {key: io.BytesIO(value) for key, value in example.items() if isinstance(value, bytes)}
                    yield number, {**example, **files}

    Small.name = name
    builder = Small(data_dir=str(data_dir), config=config, file_format=file_format)
    builder.download_and_prepare()
    return Path(builder.data_dir)


def stored_order(folder: Path, part: str, label: str = "label") -> list[tuple[bytes, int]]:
    """Return (encoded image, label) of a slice as TensorFlow Datasets itself reads it."""
    builder = tfds.builder_from_directory(str(folder))
    data = builder.as_data_source(split=part, decoders={"image": tfds.decode.SkipDecoding()})
    return [(bytes(example["image"]), int(example[label])) for example in data]


def simple(count: int, classes: int) -> list[dict[str, Any]]:
    return [{"image": encoded(pixels(number)), "label": number % classes} for number in range(count)]

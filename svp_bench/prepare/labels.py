"""Label rules of VTAB's tasks: from an example of TensorFlow Datasets to a label.

Source: X. Zhai et al., A Large-scale Study of Representation Learning with the Visual Task Adaptation Benchmark,
arXiv:1910.04867, and its code (google-research/task_adaptation, task_adaptation/data/{clevr,kitti,dsprites}.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Example = Mapping[str, Any]
"""Feature → value; a sequence of objects is a mapping of arrays, one row an object."""

_DEPTH_EDGES = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
_DISTANCE_EDGES = (-100.0, 8.0, 20.0, 999.0)  # metres
_VEHICLES = 3  # object types below are car, van and truck
_NO_VEHICLE = 1000.0


def _last_edge_below(value: float, edges: tuple[float, ...]) -> int:
    """Return the index of the largest edge strictly below a value; ValueError if there is none."""
    below = np.flatnonzero(np.array(edges, dtype=np.float32) < np.float32(value))
    if not below.size:
        raise ValueError(f"{value} is not above {edges[0]}")
    return int(below[-1])


def object_count(example: Example) -> int:
    """Return the number of objects minus 3: CLEVR's scenes have 3 to 10."""
    return len(example["objects"]["size"]) - 3


def nearest_object_depth(example: Example) -> int:
    """Return the bin of the smallest depth of an object; a depth on an edge belongs to the nearer bin."""
    return _last_edge_below(np.min(np.asarray(example["objects"]["pixel_coords"])[:, 2]), _DEPTH_EDGES)


def nearest_vehicle_distance(example: Example) -> int:
    """Return the bin of the nearest car, van or truck by its z coordinate; the last bin means that there is none."""
    objects = example["objects"]
    locations = np.asarray(objects["location"], dtype=np.float32).reshape(-1, 3)
    vehicles = locations[np.asarray(objects["type"]) < _VEHICLES, 2]
    return _last_edge_below(min([*vehicles.tolist(), _NO_VEHICLE]), _DISTANCE_EDGES)


def x_position_in_16(example: Example) -> int:
    """Return the horizontal position, 32 values in pairs."""
    return int(example["label_x_position"]) // 2


def orientation_in_16(example: Example) -> int:
    """Return the orientation: 40 values in 16 bins of 3 and 2 values in turn."""
    return int(np.floor(np.float32(example["label_orientation"]) / np.float32(2.5)))


RULES: Mapping[str, Callable[[Example], int]] = {
    rule.__name__: rule
    for rule in (object_count, nearest_object_depth, nearest_vehicle_distance, x_position_in_16, orientation_in_16)
}


def label_of(example: Example, label: str) -> int:
    """Return the label of an example by a rule of that name, else the value of the feature.

    Raises:
        KeyError: If there is neither.
        ValueError: If the rule does not cover the example.
    """
    return RULES[label](example) if label in RULES else int(example[label])

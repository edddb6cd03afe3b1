"""Two floors for every table of small images: logistic regression on raw pixels, under the suite's own protocol.

`pixels`: the grey or colour values of an image, standardised. `contrasts`: how far each pixel is from the median of
its image, for any sign, at 16 × 16 or fewer: where a figure may be light on dark or dark on light, a linear
reader of plain values is at chance for that reason alone. Both go to scikit-learn's logistic regression. Its C is
chosen on `val` after fitting on `train`, of equal ones that nearest to 1, scikit-learn's default; the chosen one is
refitted on the final stage's list, and `test` is read once. There is no seed in it: the solution is the minimum of a
convex loss.

    python benchmarks/raw_pixels.py --suite demo --output results/reference/demo/raw_pixels.json
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sklearn
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from svp_bench.core.atomic import replacing
from svp_bench.data.sources import Images, Source, open_source
from svp_bench.tasks.cards import load_protocol, load_suite, load_task

Table = npt.NDArray[np.float64]
MOST_SIDE = 16  # of the contrasts
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C: the inverse of the penalty's weight


def pixels(image: Table) -> Table:
    """Return the values of an image, (H, W, 3), in a row."""
    return image.ravel()


def contrasts(image: Table) -> Table:
    """Return the absolute deviations from the image's median colour, averaged over colours and blocks, in a row."""
    away = np.abs(image - np.median(image, axis=(0, 1))).mean(axis=2)
    block = -(-max(away.shape) // MOST_SIDE)
    high, wide = (side // block * block for side in away.shape)
    return away[:high, :wide].reshape(high // block, block, wide // block, block).mean(axis=(1, 3)).ravel()


FEATURES = {"pixels": pixels, "contrasts": contrasts}


def table(images: Images, feature: Callable[[Table], Table]) -> Table:
    """Return float64 (N, D): a feature of each image of a list."""
    loaded = (np.asarray(images.load(index), dtype=np.float64) for index in range(len(images)))
    return np.stack([feature(image) for image in loaded])


def fitted(features: Table, labels: npt.NDArray[np.int64], strength: float) -> Pipeline:
    """Return the classifier of a list."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=5000))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)  # a minimum not reached is not a result
        return classifier.fit(features, labels)


def accuracy(classifier: Pipeline, features: Table, labels: npt.NDArray[np.int64]) -> float:
    """Return the share that it gets right, in per cent."""
    return 100.0 * float((classifier.predict(features) == labels).mean())


def measure(
    source: Source, select: tuple[str, str], final: tuple[str, str], features: Callable[[Images], Table]
) -> dict[str, Any]:
    """Choose C on the first stage, report the second."""
    known = {name: (features(source.splits[name]), source.splits[name].labels) for name in {*select, *final}}
    (train, val), (refit, test) = ([known[name] for name in names] for names in (select, final))
    on_val = {strength: accuracy(fitted(*train, strength), *val) for strength in STRENGTHS}
    chosen = max(STRENGTHS, key=lambda strength: (on_val[strength], -abs(math.log10(strength))))
    return {
        "top1": accuracy(fitted(*refit, chosen), *test),
        "test_images": len(test[1]),
        "C": chosen,
        "val_top1": {str(strength): value for strength, value in on_val.items()},
    }


def save(result: dict[str, Any], output: Path | None) -> None:
    """Write a result as JSON, if it is to be written."""
    if output is not None:
        with replacing(output) as file:
            file.write((json.dumps(result, indent=2) + "\n").encode())
        print(f"wrote {output}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Logistic regression on raw pixels, for every task of a suite.")
    parser.add_argument("--suite", default="demo")
    parser.add_argument("--output", type=Path, help="JSON")
    arguments = parser.parse_args()
    suite = load_suite(arguments.suite)
    stages = load_protocol(suite.protocol).stages
    tasks = {}
    for name in suite.tasks:
        source = open_source(load_task(name))
        select, final = stages["select"], stages["final"]
        lists = (select["train"], select["val"]), (final["train"], final["test"])
        tasks[name] = {
            "data_digest": source.digest,
            **{one: measure(source, *lists, partial(table, feature=of)) for one, of in FEATURES.items()},
        }
        shown = ", ".join(f"{one} {tasks[name][one]['top1']:.2f} % (C {tasks[name][one]['C']})" for one in FEATURES)
        print(f"{name}: {shown}", flush=True)
    result = {"what": "logistic regression without a network", "scikit_learn": sklearn.__version__, "tasks": tasks}
    save(result, arguments.output)


if __name__ == "__main__":
    main()

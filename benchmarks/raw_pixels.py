"""The floor for every table of small pictures: logistic regression on raw pixels, under the suite's own protocol.

The grey or colour values of a picture, standardised, go to scikit-learn's logistic regression. Its C is chosen on `val`
after fitting on `train`, of equal ones that nearest to 1, scikit-learn's default; the chosen one is refitted on the
final stage's list, and `test` is read once. There is no seed in it: the solution is the minimum of a convex loss.

    python benchmarks/raw_pixels.py --suite demo --output results/reference/demo/raw_pixels.json
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sklearn
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from svp_bench.atomic import replacing
from svp_bench.cards import load_protocol, load_suite, load_task
from svp_bench.data.sources import Pictures, Source, open_source

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C: the inverse of the penalty's weight


def table(pictures: Pictures) -> npt.NDArray[np.float64]:
    """Return float64 (N, D): the pixels of each picture, in a row."""
    return np.stack([np.asarray(pictures.load(index), dtype=np.float64).ravel() for index in range(len(pictures))])


def fitted(pictures: Pictures, strength: float) -> Pipeline:
    """Return the classifier of a list."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=5000))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)  # a minimum not reached is not a result
        return classifier.fit(table(pictures), pictures.labels)


def accuracy(classifier: Pipeline, pictures: Pictures) -> float:
    """Return the share that it gets right, in per cent."""
    return 100.0 * float((classifier.predict(table(pictures)) == pictures.labels).mean())


def measure(source: Source, select: tuple[str, str], final: tuple[str, str]) -> dict[str, Any]:
    """Choose C on the first stage, report the second."""
    train, val = (source.lists[name] for name in select)
    on_val = {strength: accuracy(fitted(train, strength), val) for strength in STRENGTHS}
    chosen = max(STRENGTHS, key=lambda strength: (on_val[strength], -abs(math.log10(strength))))
    test = source.lists[final[1]]
    return {
        "top1": accuracy(fitted(source.lists[final[0]], chosen), test),
        "test_pictures": len(test),
        "C": chosen,
        "val_top1": {str(strength): value for strength, value in on_val.items()},
        "digests": {name: pictures.digest for name, pictures in source.lists.items()},
    }


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
        tasks[name] = measure(source, (select["train"], select["val"]), (final["train"], final["test"]))
        print(f"{name:24} {tasks[name]['top1']:6.2f} %  (C {tasks[name]['C']})", flush=True)
    result = {"what": "logistic regression on raw pixels", "scikit_learn": sklearn.__version__, "tasks": tasks}
    if arguments.output:
        with replacing(arguments.output) as file:
            file.write((json.dumps(result, indent=2) + "\n").encode())
        print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()

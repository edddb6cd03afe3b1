"""Logistic regression as in raw_pixels.py on the features of the network, with and without pre-training.

The probe is trained to convergence; the suite's `linear` is trained by AdamW for as many epochs as every method.
Random weights are sampled once per seed; the embedded ones are fixed.

    python benchmarks/features.py --suite demo --output results/reference/demo/features.json
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from raw_pixels import Table, measure, save

from svp_bench.data.sources import Images, open_source
from svp_bench.data.transforms import EvalTransform
from svp_bench.methods.build import create_model
from svp_bench.tasks.cards import ProtocolCard, load_protocol, load_suite, load_task

BACKBONE, SIDE = "vim_nano_patch8_64", 64
SEEDS = range(5)  # of random weights
BATCH = 64


def network(checkpoint: str, seed: int) -> Any:
    """Return the backbone, ready to be read."""
    torch.manual_seed(seed)
    return create_model(BACKBONE, num_classes=2, method="linear", checkpoint=checkpoint).eval()


def features(images: Images, model: Any, protocol: ProtocolCard) -> Table:
    """Return float64 (N, D): the normed class token of each image of a list."""
    view = EvalTransform(SIDE, resize=protocol.resize, interpolation=protocol.interpolation)
    mean, std = (torch.tensor(model.default_cfg[name]).view(1, 3, 1, 1) * 255 for name in ("mean", "std"))
    parts = []
    for start in range(0, len(images), BATCH):
        seen = [view(images.load(i)) for i in range(start, min(start + BATCH, len(images)))]
        with torch.inference_mode():
            parts.append(model.forward_features((torch.from_numpy(np.stack(seen)).float() - mean) / std).double())
    return torch.cat(parts).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description="Logistic regression on frozen features, for every task of a suite.")
    parser.add_argument("--suite", default="demo")
    parser.add_argument("--output", type=Path, help="JSON")
    arguments = parser.parse_args()
    suite = load_suite(arguments.suite)
    protocol = load_protocol(suite.protocol)
    select, final = protocol.stages["select"], protocol.stages["final"]
    tasks = {}
    for name in suite.tasks:
        source = open_source(load_task(name))
        lists = (select["train"], select["val"]), (final["train"], final["test"])
        found = {
            checkpoint: [
                measure(source, *lists, partial(features, model=network(checkpoint, seed), protocol=protocol))
                for seed in seeds
            ]
            for checkpoint, seeds in (("embedded", [0]), ("none", SEEDS))
        }
        tasks[name] = {"data_digest": source.digest, "embedded": found["embedded"][0], "random": found["none"]}
        chances = [one["top1"] for one in found["none"]]
        print(f"{name}: embedded {tasks[name]['embedded']['top1']:.2f} %, random {np.mean(chances):.2f} %", flush=True)
    result = {"what": "logistic regression on frozen features", "backbone": BACKBONE, "tasks": tasks}
    result |= {"scikit_learn": sklearn.__version__, "torch": str(torch.__version__)}
    save(result, arguments.output)


if __name__ == "__main__":
    main()

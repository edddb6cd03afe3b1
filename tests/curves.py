"""The losses of some steps of training, to compare devices and backends by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

import svp_bench

STEPS, BATCH, CLASSES = 50, 4, 5


def curve(method: str, device: str, backend: str, steps: int = STEPS) -> list[float]:
    """Train Vim-nano in float32 on fixed images, and return the loss of each step."""
    torch.manual_seed(0)
    model = svp_bench.create_model("vim_nano_patch8_64", num_classes=CLASSES, method=method)
    model.set_scan_backend(backend)
    images, labels = torch.randn(4 * BATCH, 3, 64, 64), torch.randint(0, CLASSES, (4 * BATCH,))
    model = model.eval().to(device)  # no dropout, whose draws differ by device
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for step in range(steps):
        part = slice(step % 4 * BATCH, (step % 4 + 1) * BATCH)
        loss = F.cross_entropy(model(images[part].to(device)), labels[part].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def follows(found: Sequence[float], expected: Sequence[float]) -> bool:
    """Whether a curve is another but for rounding, which steps of training enlarge."""
    falls = expected[-1] < 0.8 * expected[0]
    return falls and all(abs(a - b) <= 2e-4 * (1 + b) for a, b in zip(found, expected, strict=True))

"""Linear probing, then full fine-tuning."""

from __future__ import annotations

from svp_bench.methods.base import check_setting, stage_border
from svp_bench.methods.full import Full
from svp_bench.models.backbone import HEAD_PREFIXES


class LPFT(Full):
    """Train the head alone for a share of the epochs, then everything.

    Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", ICLR 2022,
    arXiv:2202.10054: a new head moves the features of the first steps far; one that fits already does not.

    Stages: the head; then all. Both are within the epochs of the protocol and its one learning rate schedule, so that
    fine-tuning begins at the rate that the schedule has by then; the paper tunes a rate for each.

    Trained parameters without the head: all, as of `full`; those of the last stage count.

    Args:
        probe_share: Share of the epochs for the head alone, at least one epoch. An open question: the paper probes
            until the head has converged.
    """

    stages = 2

    def __init__(self, probe_share: float = 0.5) -> None:
        check_setting("lp_ft", "probe_share", probe_share, "positive")
        check_setting("lp_ft", "probe_share", probe_share, "fraction")
        self.probe_share = probe_share

    def stage(self, epoch: int, epochs: int) -> int:
        """Return 0 while the head trains alone, then 1."""
        return int(epoch >= stage_border(self.probe_share, epochs))

    def trains_in_stage(self, name: str, stage: int) -> bool:
        """Whether it is the head, or the stage the last."""
        return stage == 1 or name.startswith(HEAD_PREFIXES)

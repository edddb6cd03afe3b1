"""Metrics in addition to top-1: top-5, per-class and balanced accuracy, NLL, calibration, confusion.

Every image is scored by itself (`score_images`), in float64 on the CPU. The images of all batches and processes
are put in the order of their list (`in_order`), and each number is computed once from all of them (`evaluate`), by sums
that are rounded once (`math.fsum`). So for the same logits no number depends on the batch size or on the number of
processes, bit for bit.

torchmetrics counts the confusion matrix. Its balanced accuracy counts a class without images as 0 once it is predicted,
and its calibration error has bins closed on the other side, so these two are computed here.

Ties: of classes with equal logits the one with the smallest index comes first, for top-1 as for top-5; that is what
`torch.argmax` does.
"""

from __future__ import annotations

import csv
import io
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from svp_bench.core.errors import plural
from svp_bench.records.record import Metrics, PerClass
from svp_bench.records.store import csv_text, write_atomically

ECE_BINS = 15
_TOP5_CLASSES = 6  # with fewer classes the label is always, or all but always, among the first five


class ImageScores(NamedTuple):
    """Scores of each image of an evaluation; all of shape (images,), on the CPU.

    Attributes:
        index: int64, positions of the images in their list.
        label: int64, the true classes.
        prediction: int64, the classes with the largest logits.
        top5: bool, is the label among the five classes with the largest logits?
        confidence: float64, softmax probability of the prediction.
        loss: float64, -log of the softmax probability of the label, in nats.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    label: Tensor
    prediction: Tensor
    top5: Tensor
    confidence: Tensor
    loss: Tensor


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The numbers of one evaluation; fractions are of 1, not percent.

    Attributes:
        scores: The images, in the order of their list.
        confusion: int64 (classes, classes): images of each true class (row) by predicted class (column).
        top1: Accuracy.
        top5: Images whose label is among the first five classes; None where there are fewer than six classes.
        balanced_accuracy: Mean recall of the classes that occur.
        nll: Mean negative log-likelihood (cross entropy without label smoothing), in nats.
        ece: Expected calibration error, see `expected_calibration_error`.
    """

    scores: ImageScores
    confusion: NDArray[np.int64]
    top1: float
    top5: float | None
    balanced_accuracy: float
    nll: float
    ece: float

    @property
    def right(self) -> NDArray[np.bool_]:
        """Which images are classified rightly, bool (images,)."""
        right: NDArray[np.bool_] = (self.scores.prediction == self.scores.label).numpy()
        return right

    def scalars(self) -> dict[str, float]:
        """Return the numbers by the names that TensorBoard shows; `loss` and `nll` are the same."""
        named = {
            "top1": self.top1,
            "top5": self.top5,
            "balanced_accuracy": self.balanced_accuracy,
            "loss": self.nll,
            "nll": self.nll,
            "ece": self.ece,
        }
        return {name: value for name, value in named.items() if value is not None}

    def for_record(self) -> Metrics:
        """Return the numbers as a record holds them: accuracies and calibration error in percent."""
        correct, count = int(self.right.sum()), len(self.scores.label)
        return Metrics(
            top1=100.0 * correct / count,
            loss=self.nll,
            correct=correct,
            count=count,
            top5=None if self.top5 is None else 100.0 * int(self.scores.top5.sum()) / count,
            balanced_accuracy=100.0 * self.balanced_accuracy,
            nll=self.nll,
            ece=100.0 * self.ece,
            per_class=PerClass(tuple(self.confusion.diagonal().tolist()), tuple(self.confusion.sum(axis=1).tolist())),
        )


# --- the numbers -----------------------------------------------------------------------------------------------------


def score_images(logits: Tensor, labels: Tensor, index: Tensor) -> ImageScores:
    """Score each image of a batch by itself.

    Args:
        logits: (B, classes), of any floating type and device. A logit that is not finite gives a loss that is not
            finite, except -inf for a class other than the label: a probability of 0.
        labels: int64 (B,), 0..classes-1.
        index: int64 (B,), positions of the images in their list.
    """
    logits, labels = logits.detach().cpu().double(), labels.cpu()
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1]) < labels[:, None]
    rank = ((logits > own) | ((logits == own) & earlier)).sum(dim=1)
    prediction = logits.argmax(dim=1)
    return ImageScores(
        index=index.cpu(),
        label=labels,
        prediction=prediction,
        top5=rank < 5,
        confidence=F.softmax(logits, dim=1).gather(1, prediction[:, None])[:, 0],
        loss=-F.log_softmax(logits, dim=1).gather(1, labels[:, None])[:, 0],
    )


def in_order(parts: Sequence[ImageScores]) -> ImageScores:
    """Put the images of one or more batches, of any process, in the order of their split.

    Raises:
        ValueError: If there is no part.
    """
    if not parts:
        raise ValueError("no images were scored")
    joined = [torch.cat(column) for column in zip(*parts, strict=True)]
    order = joined[0].argsort(stable=True)
    return ImageScores(*(column[order] for column in joined))


def confusion_matrix(labels: Tensor, predictions: Tensor, classes: int) -> NDArray[np.int64]:
    """Count images by true class (row) and predicted class (column): int64 (classes, classes).

    Args:
        labels: int64 (images,), 0..classes-1.
        predictions: int64 (images,), 0..classes-1.
        classes: Number of classes.

    Raises:
        RuntimeError: If a label or prediction is out of range.
    """
    counts: NDArray[np.int64] = multiclass_confusion_matrix(predictions, labels, max(2, classes)).numpy()
    return counts[:classes, :classes]  # torchmetrics refuses a task of one class


def per_class_accuracy(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the accuracy among the images of each class (its recall), (classes,); nan for a class without any."""
    support = confusion.sum(axis=1)
    accuracy = np.full(len(confusion), np.nan)
    np.divide(confusion.diagonal(), support, out=accuracy, where=support > 0)
    return accuracy


def balanced_accuracy(confusion: NDArray[np.int64]) -> float:
    """Return the mean of `per_class_accuracy` over the classes that occur; nan if none does."""
    accuracy = per_class_accuracy(confusion)
    occurring = accuracy[~np.isnan(accuracy)]
    return math.fsum(occurring) / len(occurring) if len(occurring) else math.nan


def expected_calibration_error(
    confidence: NDArray[np.float64], right: NDArray[np.bool_], bins: int = ECE_BINS
) -> float:
    """Return the top-label expected calibration error in equal-width bins (Guo et al., ICML 2017, equation 3).

    Bin m of M holds the confidences in ((m - 1) / M, m / M]; the error is the mean of |accuracy - mean confidence| over
    the bins, weighted by their images.

    Args:
        confidence: (images,), probability of the predicted class, 0 < p <= 1.
        right: (images,), is the prediction right?
        bins: Number of bins M.

    Returns:
        A fraction, 0..1; nan without images.
    """
    if not len(confidence):
        return math.nan
    edges = np.arange(1, bins) / bins
    bin_of = np.searchsorted(edges, confidence, side="left")
    gaps = (abs(math.fsum(confidence[bin_of == number]) - int(right[bin_of == number].sum())) for number in range(bins))
    return math.fsum(gaps) / len(confidence)


def evaluate(scores: ImageScores, classes: int) -> Evaluation:
    """Compute every number from the images of a whole list.

    Args:
        scores: Of all images (at least one), from `in_order`.
        classes: Number of classes of the task.

    Raises:
        ValueError: If there are no images, or a label lies outside 0..classes-1.
    """
    count = len(scores.label)
    if not count:
        raise ValueError("no images were scored")
    confusion = confusion_matrix(scores.label, scores.prediction, classes)
    return Evaluation(
        scores=scores,
        confusion=confusion,
        top1=int(confusion.diagonal().sum()) / count,
        top5=int(scores.top5.sum()) / count if classes >= _TOP5_CLASSES else None,
        balanced_accuracy=balanced_accuracy(confusion),
        nll=math.fsum(scores.loss.tolist()) / count,
        ece=expected_calibration_error(scores.confidence.numpy(), (scores.prediction == scores.label).numpy()),
    )


# --- for people ------------------------------------------------------------------------------------------------------


def describe(metrics: Metrics, list_name: str) -> str:
    """Return one line for the end of a run: what the record holds, and how many classes had no images."""
    parts = [f"top-1 {metrics.top1:.2f} % on {list_name} ({metrics.correct} of {metrics.count})"]
    if metrics.top5 is not None:
        parts.append(f"top-5 {metrics.top5:.2f} %")
    if metrics.balanced_accuracy is not None:
        absent = metrics.per_class.count.count(0) if metrics.per_class else 0
        without = f" (without {_classes(absent)} that {list_name} does not show)" if absent else ""
        parts.append(f"balanced accuracy {metrics.balanced_accuracy:.2f} %{without}")
    if metrics.ece is not None:
        parts.append(f"ECE {metrics.ece:.2f} %")
    return ", ".join(parts)


def _classes(count: int) -> str:
    return plural(count, "class")


def write_tables(evaluation: Evaluation, names: Sequence[str], folder: Path, role: str) -> tuple[Path, Path]:
    """Write `<role>_confusion.csv` and `<role>_per_class.csv` into a folder.

    The first has a row for each true class and a column for each predicted one, in images. The second has class,
    name, count, correct and accuracy in percent, "nan" for a class without images.

    Args:
        evaluation: What to write.
        names: One name for each class.
        folder: The run's folder.
        role: "val" or "test".

    Returns:
        The two paths.

    Raises:
        RecordError: If they cannot be written.
    """
    confusion = evaluation.confusion
    names = [csv_text(name) for name in names]
    matrix = [["true/predicted", *names], *([name, *row] for name, row in zip(names, confusion.tolist(), strict=True))]
    columns = (confusion.sum(axis=1).tolist(), confusion.diagonal().tolist(), per_class_accuracy(confusion).tolist())
    classes = [["class", "name", "count", "correct", "accuracy"]]
    for number, (name, count, correct, accuracy) in enumerate(zip(names, *columns, strict=True)):
        classes.append([str(number), name, str(count), str(correct), f"{100 * accuracy:.4f}"])
    paths = folder / f"{role}_confusion.csv", folder / f"{role}_per_class.csv"
    for path, rows in zip(paths, (matrix, classes), strict=True):
        _write_csv(path, rows)
    return paths


def write_predictions(
    evaluation: Evaluation, images: Sequence[str], names: Sequence[str], folder: Path, role: str
) -> Path:
    """Write `<role>_predictions.csv` into a folder: what was predicted for each image, in the order of the split.

    The columns are index, image, label, label_name, prediction, prediction_name, confidence (softmax probability of the
    prediction) and correct (1 or 0).

    Args:
        evaluation: What to write.
        images: Path or number of each image of the split.
        names: One name for each class.
        folder: The run's folder.
        role: "val" or "test".

    Raises:
        RecordError: If it cannot be written.
    """
    scores, shown = evaluation.scores, [csv_text(name) for name in names]
    rows: list[list[str]] = [
        ["index", "image", "label", "label_name", "prediction", "prediction_name", "confidence", "correct"]
    ]
    columns = (column.tolist() for column in (scores.index, scores.label, scores.prediction, scores.confidence))
    for index, label, prediction, confidence in zip(*columns, strict=True):
        classes = [str(label), shown[label], str(prediction), shown[prediction]]
        image = csv_text(images[index])
        rows.append([str(index), image, *classes, f"{confidence:.6f}", str(int(label == prediction))])
    path = folder / f"{role}_predictions.csv"
    _write_csv(path, rows)
    return path


def _write_csv(path: Path, rows: Sequence[Sequence[object]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_atomically(path, text.getvalue())


def per_class_markdown(evaluation: Evaluation, names: Sequence[str]) -> str:
    """Return the per-class accuracies as a Markdown table, for TensorBoard's texts."""
    lines = ["| class | name | images | right | accuracy |", "| ---: | :--- | ---: | ---: | ---: |"]
    confusion = evaluation.confusion
    columns = (confusion.sum(axis=1).tolist(), confusion.diagonal().tolist(), per_class_accuracy(confusion).tolist())
    for number, (name, count, correct, accuracy) in enumerate(zip(names, *columns, strict=True)):
        shown = f"{100 * accuracy:.2f} %" if count else "no images"
        escaped = name.replace("|", "\\|")
        lines.append(f"| {number} | {escaped} | {count} | {correct} | {shown} |")
    return "\n".join(lines)


_LABELLED = 50  # classes, at most, whose names label the matrix
_LONGEST = 24  # letters of a name
_WHITE, _BLUE, _GREY, _BLACK = (255, 255, 255), (8, 48, 107), (224, 224, 224), (0, 0, 0)
_MARGIN = 8
_LEGEND = "rows: true class; columns: predicted. Share of the row: white 0 %, blue 100 %; grey: no images"


def confusion_image(confusion: NDArray[np.int64], names: Sequence[str]) -> NDArray[np.uint8]:
    """Draw a confusion matrix, each row divided by its sum: uint8 (height, width, 3).

    Up to 50 classes are labelled; more would be unreadable. A row without images is grey.

    Args:
        confusion: (classes, classes), from `confusion_matrix`.
        names: One name for each class.
    """
    classes = len(confusion)
    labelled = classes <= _LABELLED
    cell = max(14, min(48, 560 // classes)) if labelled else max(1, 800 // classes)
    support = confusion.sum(axis=1, keepdims=True)
    share = (confusion / np.maximum(support, 1))[..., None]
    colours = np.where(support[..., None] > 0, (1 - share) * _WHITE + share * _BLUE, _GREY)
    matrix = Image.fromarray(np.rint(colours).astype(np.uint8).repeat(cell, axis=0).repeat(cell, axis=1))

    font = ImageFont.load_default()
    labels = [_text(_shortened(name), font) for name in names] if labelled else []
    legend = _text(_LEGEND, font)
    aside = max((label.width for label in labels), default=0) + _MARGIN
    width = max(aside + matrix.width, legend.width) + 2 * _MARGIN
    image = Image.new("RGB", (width, aside + matrix.height + legend.height + 3 * _MARGIN), _WHITE)
    left, top = _MARGIN + aside, _MARGIN + aside
    image.paste(matrix, (left, top))
    ImageDraw.Draw(image).rectangle((left - 1, top - 1, left + matrix.width, top + matrix.height), outline=_BLACK)
    for number, label in enumerate(labels):
        middle = number * cell + cell // 2
        image.paste(label, (left - label.width - _MARGIN // 2, top + middle - label.height // 2))
        upright = label.rotate(90, expand=True)
        image.paste(upright, (left + middle - upright.width // 2, top - upright.height - _MARGIN // 2))
    image.paste(legend, (_MARGIN, top + matrix.height + _MARGIN))
    return np.asarray(image, dtype=np.uint8)


def _shortened(name: str) -> str:
    """Cut a name to length, in ASCII: Pillow's own font has no other letters."""
    letters = (c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    name = "".join(c if " " <= c <= "~" else "?" for c in letters)
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 3]}..."


def _text(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> Image.Image:
    """Draw a line of text, black on white, no larger than it is."""
    left, top, right, bottom = font.getbbox(text)
    image = Image.new("RGB", (max(1, math.ceil(right - left)), max(1, math.ceil(bottom - top))), _WHITE)
    ImageDraw.Draw(image).text((-left, -top), text, fill=_BLACK, font=font)
    return image

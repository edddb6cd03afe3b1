"""Source: the archives that torchvision's data set classes download, unpacked as these classes store them.

torchvision neither resumes nor retries a download, so `fetch` gets the archives and checks torchvision's own MD5s;
torchvision unpacks them, and the task's reader has its class check the result.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from svp_bench.core.atomic import file_digest
from svp_bench.core.errors import DataError, UsageError, file_size
from svp_bench.data.reading import foreign_errors, readable
from svp_bench.prepare.download import fetch
from svp_bench.prepare.sources import Built, DataSource, Request, refuse_shared
from svp_bench.prepare.stage import Stage
from svp_bench.tasks.cards import SuiteCard, TaskCard

_READER = "torchvision"


@dataclass(frozen=True)
class Archive:
    """A file that a class of torchvision downloads.

    Attributes:
        address: Its address.
        md5: 32 hexadecimal digits.
        folder: Folder below the class's root into which it is unpacked.
        packed: Whether it is an archive; else the file itself is what the class reads.
    """

    address: str
    md5: str
    folder: str = ""
    packed: bool = True

    @property
    def name(self) -> str:
        """File name."""
        return self.address.rpartition("/")[2]


_TORONTO = "https://www.cs.toronto.edu/~kriz"
_ERDA = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370"
_STANFORD = "http://ufldl.stanford.edu/housenumbers"
# Keyed by torchvision's class; a test compares with torchvision.
ARCHIVES: Mapping[str, tuple[Archive, ...]] = {
    "CIFAR10": (Archive(f"{_TORONTO}/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),),
    "CIFAR100": (Archive(f"{_TORONTO}/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),),
    "DTD": (
        Archive(
            "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz",
            "fff73e5086ae6bdbea199a49dfb8a4c1",
            "dtd",
        ),
    ),
    "Food101": (Archive("http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz", "85eeb15f3717b99a5da872d97d918f87"),),
    "GTSRB": (
        Archive(f"{_ERDA}/GTSRB-Training_fixed.zip", "513f3c79a4c5141765e10e952eaa2478", "gtsrb"),
        Archive(f"{_ERDA}/GTSRB_Final_Test_Images.zip", "c7e4e6327067d32654124b0fe9e82185", "gtsrb"),
        Archive(f"{_ERDA}/GTSRB_Final_Test_GT.zip", "fe31e9c9270bbcd7b84b7f21a9d9d9e5", "gtsrb"),
    ),
    "SVHN": (
        Archive(f"{_STANFORD}/train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373", packed=False),
        Archive(f"{_STANFORD}/test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3", packed=False),
    ),
}


class TorchvisionSource(DataSource):
    """Download what torchvision's classes download, or take the archives from a folder (`--from`)."""

    def plan(self, card: TaskCard, suite: SuiteCard, request: Request) -> dict[str, object]:
        """Return names and MD5s of the archives; `--from` is a folder that holds them, or an address above them."""
        return {one.name: f"md5:{one.md5}" for one in _archives(card, suite)}

    def probe(self, card: TaskCard, suite: SuiteCard, request: Request) -> str:
        """Return which archives are there, and the addresses of the others."""
        found = []
        for one in _archives(card, suite):
            place = _local(request, one) or request.downloads / one.name
            is_there = place.is_file()
            found.append(f"{place} ({file_size(place.stat().st_size)})" if is_there else _addresses(request, one)[0])
        return f"torchvision's {card.reader.options['set']}: {', '.join(found)}"

    def build(
        self, card: TaskCard, suite: SuiteCard, request: Request, plan: Mapping[str, object], stage: Stage
    ) -> Built:
        """Unpack the archives. What an interrupted build had unpacked is removed: nothing tells whether it is whole."""
        archives = _archives(card, suite)
        files = [_get(request, one) for one in archives]
        import torchvision  # type: ignore[import-untyped]
        from torchvision.datasets.utils import extract_archive  # type: ignore[import-untyped]

        with readable(stage.folder):
            shutil.rmtree(stage.folder)
            stage.folder.mkdir()
        for one, file in zip(archives, files, strict=True):
            folder = stage.folder / one.folder
            with foreign_errors(file, "check free space, and get the archive again"):
                folder.mkdir(exist_ok=True)
                if one.packed:
                    extract_archive(str(file), str(folder))
                else:
                    shutil.copyfile(file, folder / one.name)
        return Built("card", {"class": str(card.reader.options["set"]), "torchvision": str(torchvision.__version__)})


def _archives(card: TaskCard, suite: SuiteCard) -> tuple[Archive, ...]:
    """Return the archives of a task; UsageError if torchvision's classes do not have it."""
    if card.reader.kind == _READER:
        return ARCHIVES[str(card.reader.options["set"])]
    refuse_shared(card, suite)
    raise UsageError(f"{card.name} is not read through torchvision; `svp-bench data prepare --help` lists the sources")


def _local(request: Request, archive: Archive) -> Path | None:
    """Return the place of an archive in the folder `--from`; None if that is an address, or not given."""
    if request.location is None or "://" in request.location:
        return None
    return Path(request.location).expanduser() / archive.name


def _addresses(request: Request, archive: Archive) -> list[str]:
    """Return the addresses of an archive: below `--from`, else its own; then below the mirrors."""
    first = archive.address if request.location is None else f"{request.location.rstrip('/')}/{archive.name}"
    return [first, *(f"{mirror.rstrip('/')}/{archive.name}" for mirror in request.mirrors)]


def _get(request: Request, archive: Archive) -> Path:
    """Return an archive with the right MD5."""
    local, digest = _local(request, archive), f"md5:{archive.md5}"
    if local is None:
        place = request.downloads / archive.name
        return fetch(_addresses(request, archive), place, digest=digest, offline=request.offline, note=request.note)
    if not local.is_file():
        raise DataError(f"{local} is missing; get it from {archive.address}, or leave out --from to download it")
    with readable(local):
        found = file_digest(local, "md5")
    if found != digest:
        raise DataError(f"{local} has {found}, torchvision states {digest}; get it again from {archive.address}")
    return local

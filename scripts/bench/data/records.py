"""Measures time and memory of a data set of many small images: reading, starting again, ordering, one epoch.

    python -m scripts.bench.data.records /some/folder 10000 100000 1000000

Each count runs in a process of its own. Images are a few hundred bytes in tar files of 10,000, so that the numbers are
those of the records and not of decoding. Anonymous memory is what the process holds; mapped files can be dropped by the
system.
"""

import argparse
import io
import logging
import multiprocessing
import shutil
import tarfile
import time
from itertools import islice
from pathlib import Path

from PIL import Image

from halfbyte.trainer.data.held_out import set_aside
from halfbyte.trainer.data.record import recorded, write_record
from halfbyte.trainer.data.sources.found import SourceSettings
from halfbyte.trainer.data.sources.reading import read_samples
from halfbyte.trainer.data.views.buckets import Cropping, views_of
from halfbyte.trainer.data.views.order import OrderedSet, SampleOrder

_SHARD = 10_000
_SIZES = ((64, 64), (64, 48), (48, 64), (80, 48))


def write_shards(folder: Path, count: int) -> None:
    """Writes tar files with `count` images, each with a caption and other bytes."""
    folder.mkdir(parents=True)
    images = []
    for size in _SIZES:
        stream = io.BytesIO()
        Image.new("RGB", size, "gray").save(stream, "PNG")
        images.append(stream.getvalue())
    for first in range(0, count, _SHARD):
        with (folder / f"{first // _SHARD:05d}.tar").open("wb") as file:
            for number in range(first, min(first + _SHARD, count)):
                # Decoders ignore what follows an image.
                _add(file, f"{number:08d}.png", images[number % len(images)] + number.to_bytes(4, "big"))
                _add(file, f"{number:08d}.txt", f"picture {number}, a gray rectangle".encode())
            file.write(bytes(2 * tarfile.BLOCKSIZE))


def _add(file: io.BufferedWriter, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    file.write(info.tobuf(tarfile.USTAR_FORMAT))
    file.write(data.ljust(-(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, b"\0"))


def memory() -> tuple[int, int]:
    """Returns the anonymous and the file-backed memory of this process, in MB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    anonymous, file = (int(fields[name].split()[0]) * 1024 // 10**6 for name in ("RssAnon", "RssFile"))
    return anonymous, file


class _Report:
    """Prints a line for each step: its time and the memory after it, above that at the start."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._anonymous, self._file = memory()
        self._started = time.perf_counter()

    def __call__(self, step: str) -> None:
        seconds = time.perf_counter() - self._started
        anonymous, file = memory()
        print(
            f"{self._count:>9,}  {step:<16}  {seconds:8.1f} s  {anonymous - self._anonymous:6} MB held"
            f"  {file - self._file:6} MB mapped",
            flush=True,
        )
        self._started = time.perf_counter()


def measure(folder: Path, count: int) -> None:
    """Reads the images and goes through an epoch, and prints time and memory."""
    settings = SourceSettings(tables=folder / "tables")
    report = _Report(count)
    samples = read_samples(folder / "shards", settings=settings)
    report("first start")
    del samples
    samples = read_samples(folder / "shards", settings=settings)
    report("later start")
    (trained,), _ = set_aside([samples], 8)
    report("held-out images")
    write_record(folder / "record.gz", recorded(trained, folder, held_out=False))
    report("record")
    groups = views_of(trained, [Cropping(64, 16)], seed=0)
    report("views")
    order = SampleOrder([OrderedSet(groups, len(groups))], seed=0, global_batch=4)
    report("order")
    for entries in islice(order.micro_batches(len(groups) // 8), len(groups) // 4):
        assert len(entries) == 4
    report("one epoch")


def _quietly(folder: Path, count: int) -> None:
    logging.disable(logging.WARNING)
    measure(folder, count)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder for the images, which must not exist")
    parser.add_argument("counts", type=int, nargs="+", help="numbers of images")
    options = parser.parse_args()
    for count in options.counts:
        started = time.perf_counter()
        write_shards(options.folder / "shards", count)
        print(f"{count:>9,}  {'writing':<16}  {time.perf_counter() - started:8.1f} s", flush=True)
        process = multiprocessing.get_context("spawn").Process(target=_quietly, args=(options.folder, count))
        process.start()
        process.join()
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()

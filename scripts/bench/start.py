"""Times a start from nothing to the first training step, and measures the memory of each phase: cold and warm.

    python -m scripts.bench.make_checkpoint /data/flux
    python -m scripts.bench.start recipes/flux_lora.yaml model.path=/data/flux --work /data/work --json start.json

Every start runs in a separate process. `cold` finds no caches, and the checkpoint's pages are dropped; `cold,
in page cache` reads the checkpoint from memory; `warm` finds latents, embeddings and the packed base; `warm,
dropped` finds the same with their pages dropped. `stock` is diffusers with bitsandbytes loading only the
transformer. Page caches are dropped by advice, which a system may ignore; the result therefore reports how
much of them is left.
"""

import argparse
import ctypes
import json
import mmap
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()

_ROWS = ("cold", "cold, in page cache", "warm", "warm, dropped", "stock")
_RATE_BYTES = 2 * 10**9


def drop_pages(folders: list[Path]) -> float | None:
    """Asks the system to drop all files' cached pages; returns the share that stayed, None if unknown."""
    left = total = 0
    for file in (file for folder in folders for file in folder.rglob("*") if file.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            size = file.stat().st_size
            pages = _resident_pages(descriptor, size) if size else 0
            if pages is None:
                return None
            left += pages * mmap.PAGESIZE
            total += size
        finally:
            os.close(descriptor)
    return left / total if total else 0.0


def _resident_pages(descriptor: int, size: int) -> int | None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        return None
    pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
    try:
        if libc.mincore(address, size, pages):
            return None
        return pages.raw.count(b"\x01")
    finally:
        libc.munmap(address, size)


def disk_rates(folder: Path) -> dict[str, float | None]:
    """Returns GB/s of writing to the disk, of reading after the pages were dropped, and of reading again."""
    file = folder / ".rate"
    block = os.urandom(2**24)
    began = time.perf_counter()
    try:
        with file.open("wb") as stream:
            for _ in range(_RATE_BYTES // len(block)):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
        size = file.stat().st_size
        write = size / (time.perf_counter() - began)
        left = _dropped(file)
        first, again = _read_rate(file), _read_rate(file)
    finally:
        file.unlink(missing_ok=True)
    return {"write": write / 1e9, "read": first / 1e9, "read_again": again / 1e9, "left_in_cache": left}


def _dropped(file: Path) -> float | None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        size = file.stat().st_size
        pages = _resident_pages(descriptor, size)
        return None if pages is None else pages * mmap.PAGESIZE / size
    finally:
        os.close(descriptor)


def _read_rate(file: Path) -> float:
    buffer = bytearray(2**24)
    began, done = time.perf_counter(), 0
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            done += count
    return done / (time.perf_counter() - began)


def measure_row(row: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures one start in a separate process, prepared as the row says."""
    work: Path = arguments.work
    checkpoint = Path(next(o for o in arguments.overrides if o.startswith("model.path=")).partition("=")[2])
    shutil.rmtree(work / "run", ignore_errors=True)
    left: float | None = 1.0
    if row.startswith("cold"):
        shutil.rmtree(work / "cache", ignore_errors=True)
    if row in ("cold", "warm, dropped"):
        left = drop_pages([checkpoint, work])
    command = [
        sys.executable,
        "-m",
        "scripts.bench.start",
        str(arguments.recipe),
        *arguments.overrides,
        f"--work={work}",
        f"--one={row}",
    ]
    if arguments.encode_budget is not None:
        command.append(f"--encode-budget={arguments.encode_budget}")
    began = time.perf_counter()
    try:
        # Its messages appear on this process's output.
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, timeout=arguments.timeout, check=True
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"{row}: {error}\n{error.stdout or ''}", file=sys.stderr, flush=True)
        return {"row": row, "failed": str(error)}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"row": row, "left_in_page_cache": left, "process_s": time.perf_counter() - began, **result}


def one_start(row: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Starts once, in the row's own process."""
    from scripts.bench import start_phases

    if row == "stock":
        return _stock(arguments)
    overrides = [
        *arguments.overrides,
        f"data.cache_dir={arguments.work / 'cache'}",
        f"output.dir={arguments.work / 'run'}",
    ]
    measured = start_phases.start(arguments.recipe, overrides, BEGAN, encode_budget=arguments.encode_budget)
    return start_phases.as_json(measured)


def _stock(arguments: argparse.Namespace) -> dict[str, Any]:
    from scripts.bench import start_phases

    watch = start_phases.PhaseWatch(BEGAN)
    with watch.phase("import"):
        import torch
        from diffusers import BitsAndBytesConfig, FluxTransformer2DModel
    folder = next(o for o in arguments.overrides if o.startswith("model.path=")).partition("=")[2]
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with watch.phase("transformer"):
        FluxTransformer2DModel.from_pretrained(
            folder, subfolder="transformer", quantization_config=config, torch_dtype=torch.bfloat16
        )
    watch.stop()
    return {"phases": [vars(phase) for phase in watch.phases], "to_first_step": None}


def table(results: list[dict[str, Any]]) -> str:
    """Returns a line per phase: seconds, and peaks in GB."""
    lines = [f"{'start':20} {'phase':12} {'s':>7} {'host':>6} {'+mapped':>8} {'device':>7} {'reserved':>8}"]
    for result in results:
        if "failed" in result:
            lines.append(f"{result['row']:20} failed: {result['failed']}")
            continue
        for phase in result["phases"]:
            lines.append(
                f"{result['row']:20} {phase['name']:12} {phase['seconds']:7.2f} {phase['host_anon']:6.2f}"
                f" {phase['host_file']:8.2f} {phase['device_allocated']:7.2f} {phase['device_reserved']:8.2f}"
            )
        if result["to_first_step"] is not None:
            left = result["left_in_page_cache"]
            said = "unknown" if left is None else f"{left:.0%}"
            lines.append(
                f"{result['row']:20} {'first step after':20} {result['to_first_step']:.2f} s (in page cache: {said})"
            )
    return "\n".join(lines)


def main() -> None:
    """Measures the requested rows one after the other, and prints each when it is done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="+", help="settings of the recipe, among them model.path=FOLDER")
    parser.add_argument("--work", type=Path, required=True, help="a folder for caches and runs; emptied")
    parser.add_argument("--rows", default=";".join(_ROWS), help="some of " + "; ".join(_ROWS))
    parser.add_argument("--timeout", type=float, default=600, help="limit of a start in seconds")
    parser.add_argument("--json", type=Path, help="write all results to this file, again after each row")
    parser.add_argument("--encode-budget", type=float, help="GiB of device memory to encode within")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one_start(arguments.one, arguments)))
        return
    if not any(override.startswith("model.path=") for override in arguments.overrides):
        parser.error("name the checkpoint: model.path=FOLDER")
    rows = arguments.rows.split(";")
    if unknown := [row for row in rows if row not in _ROWS]:
        parser.error(f"--rows: got {'; '.join(unknown)}, accepted: {'; '.join(_ROWS)}")
    arguments.work.mkdir(parents=True, exist_ok=True)
    rates = disk_rates(arguments.work)
    print("disk, GB/s:", ", ".join(f"{name} {rate}" for name, rate in rates.items()), flush=True)
    results: list[dict[str, Any]] = []
    for row in rows:
        results.append(measure_row(row, arguments))
        print(table(results[-1:]), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps({"disk": rates, "starts": results}, indent=1) + "\n")
    if any("failed" in result for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

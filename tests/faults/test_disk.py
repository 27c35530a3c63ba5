"""Tests disks that are full or read-only: one message, exit code 6, and nothing lost."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from halfbyte.trainer.errors import DiskError
from halfbyte.trainer.export.export import ADAPTER_FILE
from halfbyte.trainer.run_folder import checkpoint
from halfbyte.trainer.training.metrics import read_metrics

from kill_points import tree
from run_server import SLOW_STEPS
from runs import run_here, write_recipe
from soak import report, tries


def mounted(folder: Path, options: str) -> bool:
    """Mounts a file system of its own at `folder`; returns False where this process may not."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk; the test sets its size."""
    folder = tmp_path / "disk"
    if not mounted(folder, "size=64m"):
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def resize(disk: Path, free: int) -> None:
    """Leaves `free` bytes on the disk."""
    used = sum(path.stat().st_blocks * 512 for path in disk.rglob("*") if path.is_file())
    options = f"remount,size={used + free + 4096 * (1 + sum(1 for _ in disk.rglob('*')))}"
    subprocess.run(["mount", "-o", options, str(disk)], check=True)


@pytest.fixture(scope="module")
def expected(tmp_path_factory, mini_flux):
    """Returns the losses of a run with room enough."""
    whole = run_here(write_recipe(tmp_path_factory.mktemp("whole"), mini_flux), "train.steps=12")
    return [row.loss for row in read_metrics(whole / "metrics.csv")]


def sizes(*short: int) -> list[int]:
    """Returns the megabytes that are free on the disk, in steps of 1 MB in the long form."""
    return sorted({*short, *range(tries("MEGABYTES", 0))})


@pytest.mark.parametrize("megabytes", sizes(0, 1))
def test_a_full_disk_of_the_output_ends_the_run_with_a_message(
    server, tmp_path, mini_flux, small_disk, expected, megabytes
):
    recipe = write_recipe(tmp_path, mini_flux)
    out = f"output.dir={small_disk / 'run'}"
    run_here(recipe, "train.steps=2", "checkpoint.keep=10", out)
    before = {
        path: path.read_bytes() for path in (small_disk / "run" / "checkpoints").rglob("*") if path.is_file()
    }
    adapter = (small_disk / "run" / "adapter" / ADAPTER_FILE).read_bytes()
    resize(small_disk, megabytes * 10**6)
    process = server.start("train", str(recipe), "train.steps=12", "checkpoint.keep=10", out, "--resume")
    code = process.wait()
    report("a full disk of the output", tried=1, ended_with_a_message=code != 0)
    if code == 0:
        assert megabytes > 1, "there was room for everything"
        return
    assert code == DiskError.exit_code, process.errors
    (line,) = [line for line in process.errors.splitlines() if line.startswith("error: ")]
    assert "No space left on device" in line or "free" in line, line
    assert "start again with --resume" in line
    assert "Traceback" not in process.errors
    assert all(path.read_bytes() == content for path, content in before.items())
    assert (small_disk / "run" / "adapter" / ADAPTER_FILE).read_bytes() == adapter
    # With room again, the run goes on to the same end as one that was never stopped.
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    run_here(recipe, "train.steps=12", "checkpoint.keep=10", out, resume=True)
    assert [row.loss for row in read_metrics(small_disk / "run" / "metrics.csv")] == expected


@pytest.mark.parametrize("megabytes", sizes(0))
def test_a_full_disk_of_the_cache_ends_the_run_before_training(
    server, tmp_path, mini_flux, small_disk, megabytes
):
    recipe = write_recipe(tmp_path, mini_flux)
    resize(small_disk, 8192 + megabytes * 10**6)
    process = server.start("train", str(recipe), f"data.cache_dir={small_disk}")
    code = process.wait()
    report("a full disk of the cache", tried=1, ended_with_a_message=code != 0)
    if code == 0:
        assert megabytes > 0, "there was room for everything"
        return
    assert code == DiskError.exit_code, process.errors
    (line,) = [line for line in process.errors.splitlines() if line.startswith("error: ")]
    assert str(small_disk) in line
    assert "Traceback" not in process.errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("megabytes", sizes(0))
def test_a_full_temporary_folder_is_not_taken_for_a_damaged_checkpoint(
    server, tmp_path, mini_flux, small_disk, megabytes
):
    recipe = write_recipe(tmp_path, mini_flux)
    run = run_here(recipe)
    resize(small_disk, 4096 + megabytes * 10**6)
    process = server.start("export", str(run), "--no-self-check", environ={"TMPDIR": str(small_disk)})
    code = process.wait()
    report("a full temporary folder", tried=1, ended_with_a_message=code != 0)
    assert code == DiskError.exit_code or (code == 0 and megabytes > 0), process.errors
    assert "damaged" not in process.errors
    assert "Traceback" not in process.errors
    assert checkpoint.newest(run / "checkpoints") is not None


def test_a_full_disk_of_an_export_has_advice_for_an_export(server, tmp_path, mini_flux, small_disk):
    recipe = write_recipe(tmp_path, mini_flux)
    run = run_here(recipe, "train.steps=2", f"output.dir={small_disk / 'run'}")
    before = tree(run)
    resize(small_disk, 0)
    process = server.start("export", str(run), "--no-self-check")
    assert process.wait() == DiskError.exit_code, process.errors
    (line,) = [line for line in process.errors.splitlines() if line.startswith("error: ")]
    assert "No space left on device" in line
    assert "then repeat the command" in line
    assert "--resume" not in process.errors
    assert tree(run) == before


def test_a_folder_that_vanishes_ends_the_run_with_a_message(server, tmp_path, mini_flux):
    recipe = write_recipe(tmp_path, mini_flux)
    process = server.start("train", str(recipe), "train.steps=60", before=SLOW_STEPS)
    process.wait_for(tmp_path / "run" / "checkpoints" / "step-000002")
    os.rename(tmp_path / "run", tmp_path / "moved")
    (tmp_path / "run").write_text("a file")
    assert process.wait() == DiskError.exit_code, process.errors
    assert "Traceback" not in process.errors
    assert json.loads((tmp_path / "moved" / "checkpoints" / "step-000002" / "manifest.json").read_text())

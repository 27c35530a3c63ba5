"""Out of memory outside training, where there is no plan: one message, exit code 6, and no partial files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from halfbyte.trainer.cli.app import app
from halfbyte.trainer.denoiser import base
from halfbyte.trainer.errors import OutOfMemory
from halfbyte.trainer.runtime.device_memory import when_full

from runs import run_here, write_recipe

FULL = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDNN_STATUS_ALLOC_FAILED")]


@pytest.fixture
def trained(mini_flux: Path, tmp_path: Path) -> Path:
    recipe = write_recipe(tmp_path, mini_flux)
    return run_here(recipe, "train.steps=1", "output.export_base=false", "output.self_check=false")


@pytest.mark.parametrize("error", FULL, ids=["torch", "cudnn"])
def test_every_command_reports_it_in_one_message(
    trained: Path, mini_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise error

    adapter = trained / "adapter"
    before = {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()}
    monkeypatch.setattr(base, "_read", full)
    new = tmp_path / "new"
    for arguments in (
        ("export", trained, "--base"),
        ("sample", trained, "--prompt", "a dog", "--output", new),
        ("quantize", tmp_path / "run.yaml", "--samples", "0", "--output", new),
    ):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == OutOfMemory.exit_code, (arguments, result.output, result.exception)
        lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
        assert len(lines) == 1, result.stderr
        assert "out of memory" in lines[0]
        assert not list(new.rglob("*.safetensors")) + list(new.rglob("*.png"))
    assert {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "text",
    [
        "Triton Error [CUDA]: out of memory",
        "CUDA error: out of memory\nCUDA kernel errors might be reported later",
        "CUDA driver error: out of memory",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_out_of_memory_errors_of_all_libraries_are_recognized(text: str) -> None:
    with pytest.raises(OutOfMemory, match=r"^full$"), when_full(lambda: "full"):
        raise RuntimeError(text)


def test_a_full_host_has_another_message_than_a_full_device() -> None:
    with pytest.raises(OutOfMemory, match="host") as of_torch, when_full(lambda: "full"):
        torch.empty(2**62, dtype=torch.uint8)
    with pytest.raises(OutOfMemory, match="host") as of_python, when_full(lambda: "full"):
        bytearray(2**62)
    assert str(of_torch.value) == str(of_python.value) != "full"


def test_other_errors_pass_unchanged() -> None:
    for error in (RuntimeError("shapes do not fit"), ValueError("CUBLAS_STATUS_ALLOC_FAILED")):
        with pytest.raises(type(error)), when_full(lambda: "full"):
            raise error

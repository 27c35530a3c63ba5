"""Choosing the attention backend from the results of a separate process, even if that process crashed."""

import json
import logging
import re

import pytest
import torch

from halfbyte.trainer.denoiser import attention as attention_choice
from halfbyte.trainer.denoiser import attention_probe
from halfbyte.trainer.denoiser.attention import AttentionShape, choose_attention, run_probe
from halfbyte.trainer.errors import RecipeError

SHAPE = AttentionShape(tokens=96, heads=2, head_dim=64, dtype=torch.bfloat16)
CUDA = torch.device("cuda")
FLASH = {"backend": "flash", "error": 0.004, "seconds": 0.003}
CUDNN = {"backend": "cudnn", "error": 0.004, "seconds": 0.002}
WRONG = {"backend": "cudnn", "error": 8.0, "seconds": 0.002}
REFUSED = {"backend": "efficient", "refused": "no kernel for this"}


@pytest.fixture
def probed(monkeypatch):
    """Replaces the device and the probe's process, which prints the given results."""
    calls = []

    def give(*results):
        def run(shape, device):
            calls.append(shape)
            return list(results)

        monkeypatch.setattr(attention_choice, "run_probe", run)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
        return calls

    return give


def installed(monkeypatch, version):
    """Pretends that this version of FlashAttention-4 is installed; None: that it is not."""
    for module in (attention_choice, attention_probe):
        monkeypatch.setattr(module, "flash4_version", lambda: version)


def test_auto_chooses_the_fastest_backend_that_passed(probed, tmp_path):
    probed(REFUSED, FLASH, CUDNN)
    choice = choose_attention("auto", SHAPE, CUDA, tmp_path)
    assert choice.backend == "cudnn"
    assert "2.00 ms" in choice.reason
    assert "flash 3.00" in choice.reason
    assert "efficient" in choice.reason
    assert REFUSED["refused"] in choice.reason


@pytest.mark.parametrize("cudnn", [[], [WRONG]])
def test_a_backend_that_crashed_or_failed_the_check_is_not_chosen(probed, tmp_path, cudnn):
    probed(FLASH, *cudnn)
    choice = choose_attention("auto", SHAPE, CUDA, tmp_path)
    assert choice.backend == "flash"
    (failure,) = [part for part in re.split("[;,] ", choice.reason) if part.startswith("cudnn ")]
    assert (" 8 " in failure) == bool(cudnn)  # the relative error, or that the process crashed
    with pytest.raises(RecipeError, match=r"^train\.attention: got cudnn.*expected auto.*: flash$"):
        choose_attention("cudnn", SHAPE, CUDA, tmp_path)


def test_without_a_passing_backend_it_falls_back_with_a_warning(probed, tmp_path, caplog):
    probed()
    with caplog.at_level(logging.WARNING):
        assert choose_attention("auto", SHAPE, CUDA, tmp_path).backend == "flash"
    assert [(record.levelname, record.args) for record in caplog.records] == [("WARNING", ("flash",))]
    # The failure is not stored: the device may have been full.
    probed({"backend": "flash", "refused": "CUDA out of memory"})
    assert choose_attention("auto", SHAPE, CUDA, tmp_path).backend == "flash"
    assert len(caplog.records) == 2
    probed(FLASH, CUDNN)
    assert choose_attention("auto", SHAPE, CUDA, tmp_path).backend == "cudnn"


def test_results_are_stored_by_device_and_shape(probed, tmp_path):
    calls = probed(FLASH)
    for _ in range(2):
        choose_attention("auto", SHAPE, CUDA, tmp_path)
    assert len(calls) == 1
    choose_attention("auto", AttentionShape(97, 2, 64, torch.bfloat16), CUDA, tmp_path)
    assert len(calls) == 2
    assert len(json.loads((tmp_path / "attention.json").read_text())) == 2
    (tmp_path / "attention.json").write_text("{torn")
    choose_attention("auto", SHAPE, CUDA, tmp_path)
    assert len(calls) == 3


def test_a_cache_that_cannot_be_written_is_only_a_warning(probed, tmp_path, caplog):
    probed(FLASH)
    (tmp_path / "file").write_text("")
    assert choose_attention("auto", SHAPE, CUDA, tmp_path / "file" / "cache").backend == "flash"
    (warning,) = caplog.records
    assert str(tmp_path / "file" / "cache" / "attention.json") in warning.getMessage()


def test_a_missing_package_is_named_with_its_install_command(probed, tmp_path, monkeypatch):
    installed(monkeypatch, None)
    calls = probed(FLASH, CUDNN)
    with pytest.raises(RecipeError, match=r"^train\.attention: .*flash4.* pip install 'flash-attn-4"):
        choose_attention("flash4", SHAPE, CUDA, tmp_path)
    assert calls == []
    assert "flash4" not in choose_attention("auto", SHAPE, CUDA, tmp_path).reason


def test_an_installed_or_upgraded_package_is_checked_again(probed, tmp_path, monkeypatch):
    installed(monkeypatch, None)
    probed(FLASH, CUDNN)
    assert choose_attention("auto", SHAPE, CUDA, tmp_path).backend == "cudnn"
    installed(monkeypatch, "4.0")
    calls = probed(FLASH, {"backend": "flash4", "error": 0.003, "seconds": 0.001}, CUDNN)
    choice = choose_attention("auto", SHAPE, CUDA, tmp_path)
    assert (choice.backend, len(calls)) == ("flash4", 2)
    installed(monkeypatch, "4.1")
    probed(FLASH, {"backend": "flash4", "refused": "no kernel for sm_86"}, CUDNN)
    reason = choose_attention("auto", SHAPE, CUDA, tmp_path).reason
    assert "flash4" in reason
    assert "no kernel for sm_86" in reason


def test_deterministic_needs_no_probe(probed, tmp_path):
    calls = probed(FLASH)
    choice = choose_attention("deterministic", SHAPE, CUDA, tmp_path)
    assert (choice.backend, calls) == ("deterministic", [])
    assert choice.reason.startswith("flash, ")
    assert choose_attention("deterministic", SHAPE, torch.device("cpu"), tmp_path).backend == "cpu"


def test_without_cuda_there_is_no_choice(tmp_path):
    cpu = torch.device("cpu")
    assert choose_attention("auto", SHAPE, cpu, tmp_path).backend == "cpu"
    with pytest.raises(RecipeError, match=r"^train\.attention: got cudnn.*CUDA.* cpu.*expected auto"):
        choose_attention("cudnn", SHAPE, cpu, tmp_path)


def test_the_process_reports_which_backends_it_cannot_run():
    """Runs a real process on the CPU, which supports none of these backends."""
    results = run_probe(SHAPE, torch.device("cpu"))
    assert [result["backend"] for result in results] == ["efficient", "flash", "cudnn"]
    assert all("refused" in result for result in results)


def test_a_process_that_fails_at_once_gives_no_results(monkeypatch):
    monkeypatch.setattr(attention_choice.sys, "executable", "false")
    assert run_probe(SHAPE, torch.device("cpu")) == []


@pytest.mark.gpu
def test_at_least_one_backend_passes_on_a_gpu(tmp_path):
    device = torch.device("cuda", torch.cuda.current_device())
    choice = choose_attention("auto", SHAPE, device, tmp_path)
    assert choice.backend in ("cudnn", "flash", "flash4", "efficient")
    assert "probed" in choice.reason

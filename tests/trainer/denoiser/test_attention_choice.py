"""The choice of attention: by what a process of its own found, whatever became of it."""

import json
import logging

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
    """Stands in for the device alone: what the probe's process printed is given to `choose_attention`."""
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
    """Has FlashAttention-4 be there in this version, or not at all."""
    for module in (attention_choice, attention_probe):
        monkeypatch.setattr(module, "flash4_version", lambda: version)


def test_the_fastest_that_is_right(probed, tmp_path):
    probed(REFUSED, FLASH, CUDNN)
    choice = choose_attention("auto", SHAPE, CUDA, tmp_path)
    assert choice.backend == "cudnn"
    assert "2.00 ms" in choice.reason
    assert "flash 3.00" in choice.reason
    assert "efficient refused: no kernel for this" in choice.reason


@pytest.mark.parametrize("cudnn", [[], [WRONG]])
def test_a_backend_that_died_or_is_wrong_is_not_taken(probed, tmp_path, cudnn):
    probed(FLASH, *cudnn)
    choice = choose_attention("auto", SHAPE, CUDA, tmp_path)
    assert choice.backend == "flash"
    told = "its gradients are off by 8 of their size" if cudnn else "cudnn its process died"
    assert told in choice.reason
    with pytest.raises(
        RecipeError, match=r"cudnn is not right at this run's shapes.*accepted here: flash; or auto"
    ):
        choose_attention("cudnn", SHAPE, CUDA, tmp_path)


def test_nothing_right_falls_back_and_says_so(probed, tmp_path, caplog):
    probed()
    with caplog.at_level(logging.WARNING):
        assert choose_attention("auto", SHAPE, CUDA, tmp_path).backend == "flash"
    assert "found no backend right" in caplog.text
    # Nor is it remembered: the device may have been full.
    probed({"backend": "flash", "refused": "CUDA out of memory"})
    assert choose_attention("auto", SHAPE, CUDA, tmp_path).reason == "the probe told nothing"
    probed(FLASH, CUDNN)
    assert choose_attention("auto", SHAPE, CUDA, tmp_path).backend == "cudnn"


def test_a_probe_is_remembered_by_device_and_shape(probed, tmp_path):
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


def test_a_cache_that_cannot_be_written_stops_nothing(probed, tmp_path, caplog):
    probed(FLASH)
    (tmp_path / "file").write_text("")
    assert choose_attention("auto", SHAPE, CUDA, tmp_path / "file" / "cache").backend == "flash"
    assert "cannot remember the attention probe" in caplog.text


def test_a_package_that_is_not_there_is_named(probed, tmp_path, monkeypatch):
    installed(monkeypatch, None)
    calls = probed(FLASH, CUDNN)
    with pytest.raises(
        RecipeError, match=r"flash4 needs the package flash-attn-4 \(pip install 'flash-attn-4"
    ):
        choose_attention("flash4", SHAPE, CUDA, tmp_path)
    assert calls == []
    assert "flash4" not in choose_attention("auto", SHAPE, CUDA, tmp_path).reason


def test_a_package_that_comes_or_changes_is_tried(probed, tmp_path, monkeypatch):
    installed(monkeypatch, None)
    probed(FLASH, CUDNN)
    assert choose_attention("auto", SHAPE, CUDA, tmp_path).backend == "cudnn"
    installed(monkeypatch, "4.0")
    calls = probed(FLASH, {"backend": "flash4", "error": 0.003, "seconds": 0.001}, CUDNN)
    choice = choose_attention("auto", SHAPE, CUDA, tmp_path)
    assert (choice.backend, len(calls)) == ("flash4", 2)
    installed(monkeypatch, "4.1")
    probed(FLASH, {"backend": "flash4", "refused": "no kernel for sm_86"}, CUDNN)
    assert "flash4 refused: no kernel for sm_86" in choose_attention("auto", SHAPE, CUDA, tmp_path).reason


def test_a_fixed_order_needs_no_probe(probed, tmp_path):
    calls = probed(FLASH)
    choice = choose_attention("deterministic", SHAPE, CUDA, tmp_path)
    assert (choice.backend, calls) == ("deterministic", [])
    assert choice.reason.startswith("flash, ")
    assert choose_attention("deterministic", SHAPE, torch.device("cpu"), tmp_path).backend == "cpu"


def test_without_cuda_there_is_nothing_to_choose(tmp_path):
    cpu = torch.device("cpu")
    assert choose_attention("auto", SHAPE, cpu, tmp_path).backend == "cpu"
    with pytest.raises(RecipeError, match="cudnn needs a CUDA device, and this run is on the cpu; use auto"):
        choose_attention("cudnn", SHAPE, cpu, tmp_path)


def test_the_process_tells_what_it_cannot_run():
    """A real process, on a device that has none of these backends."""
    results = run_probe(SHAPE, torch.device("cpu"))
    assert [result["backend"] for result in results] == ["efficient", "flash", "cudnn"]
    assert all("refused" in result for result in results)


def test_a_process_that_dies_leaves_what_it_had_printed(monkeypatch):
    monkeypatch.setattr(attention_choice.sys, "executable", "false")
    assert run_probe(SHAPE, torch.device("cpu")) == []


@pytest.mark.gpu
def test_on_a_device_one_backend_at_least_is_right(tmp_path):
    device = torch.device("cuda", torch.cuda.current_device())
    choice = choose_attention("auto", SHAPE, device, tmp_path)
    assert choice.backend in ("cudnn", "flash", "flash4", "efficient")
    assert "probed" in choice.reason

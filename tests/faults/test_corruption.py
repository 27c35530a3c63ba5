"""Tests that flipped bits and cut files of a run are noticed before use, or change nothing that is used."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.quant.files.digest import sha256_file
from halfbyte.trainer.adapters.formats import PEFT_CONFIG, PEFT_FILE, PEFT_PREFIX
from halfbyte.trainer.adapters.listed_digests import PROVENANCE_FILE, checksum_of, require_intact
from halfbyte.trainer.adapters.read import read_layers
from halfbyte.trainer.adapters.saved import ADAPTER_FILE
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.export.provenance import read_provenance
from halfbyte.trainer.publish.files import adapter_files
from halfbyte.trainer.run_folder import checkpoint, checkpoint_folders
from halfbyte.trainer.run_folder.adapter_source import require_adapter
from halfbyte.trainer.run_folder.checkpoint_folders import copy_adapter
from halfbyte.trainer.run_folder.folder import RunFolder, written_recipe
from halfbyte.trainer.run_folder.pinned_base import pinned_commits
from halfbyte.trainer.training.metrics import read_metrics

from runs import run_here, write_recipe
from soak import parts, report, share, tries

FLIPS = tries("FLIPS", 300)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, mini_flux: Path) -> RunFolder:
    recipe = write_recipe(tmp_path_factory.mktemp("run"), mini_flux)
    return RunFolder(run_here(recipe, "sample.prompts=[]", "output.export_base=false"))


def damaged(content: bytes, draws: random.Random) -> bytes:
    """Flips a bit, or cuts the end off at every tenth call."""
    if draws.randrange(10) == 0:
        return content[: draws.randrange(len(content))]
    flipped = bytearray(content)
    flipped[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
    return bytes(flipped)


def read_checkpoint(run: RunFolder, copies: Path) -> object:
    """Reads what a resume, an export and `sample` read; the last checkpoint must be the one that is used."""
    saved = checkpoint.newest(run.checkpoints)
    assert saved is not None
    name = copy_adapter(run.checkpoints, None, copies)
    require_intact(saved.folder / ADAPTER_FILE)
    tensors = [load_file(copies / ADAPTER_FILE), saved.adapter, *saved.optimizer["state"].values()]
    values = [{key: torch.as_tensor(value).tolist() for key, value in part.items()} for part in tensors]
    return saved.position, name, saved.optimizer["param_groups"], saved.scaler, values


def read_export(run: RunFolder, copies: Path) -> object:
    """Reads what a push and `lora.init_from` read."""
    require_adapter(run.adapter)
    names = [file.name for file in adapter_files(run)]
    return names, read_provenance(run.adapter / PROVENANCE_FILE)


def read_recipe(run: RunFolder, copies: Path) -> object:
    return written_recipe(run)


def read_pin(run: RunFolder, copies: Path) -> object:
    return pinned_commits(run)


def read_rows(run: RunFolder, copies: Path) -> object:
    return read_metrics(run.root / "metrics.csv")


def targets(run: RunFolder) -> Iterator[tuple[Path, Callable[[RunFolder, Path], object]]]:
    for file in sorted((run.checkpoints / "step-000004").iterdir()):
        yield file, read_checkpoint
    for file in sorted(run.adapter.rglob("*")):
        if file.is_file():
            yield file, read_export
    yield run.recipe, read_recipe
    yield run.pin, read_pin
    yield run.root / "metrics.csv", read_rows


@pytest.mark.parametrize("part", parts())
def test_no_damage_is_used_in_silence(
    run: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture, part: int
) -> None:
    draws = random.Random(part)
    every = list(targets(run))
    assert len(every) >= 11
    intact = {file: (file.read_bytes(), read(run, tmp_path)) for file, read in every}
    silent = []
    numbers = share(range(FLIPS), part)
    for number in numbers:
        file, read = every[number % len(every)]
        content, expected = intact[file]
        file.write_bytes(damaged(content, draws))
        caplog.clear()
        checkpoint_folders._named.clear()  # each damaged checkpoint is named once
        refused = None
        try:
            found = read(run, tmp_path)
            if found != expected and not caplog.records and read is not read_rows:
                silent.append((file.name, number))
            if read is read_rows and not caplog.records:
                # A digit of one number may be another one. Nothing but the reports uses these numbers.
                wrong = [row for row in found if row not in expected]  # type: ignore[attr-defined, operator]
                assert len(wrong) <= 1
        except RecipeError as error:
            refused = str(error)
        finally:
            file.write_bytes(content)
        assert refused is None or str(file.parent) in refused, (file.name, number, refused)
    report("damaged files of a run", tried=len(numbers), undetected=len(silent))
    assert silent == []
    for file, read in every:
        assert read(run, tmp_path) == intact[file][1]


def test_a_damaged_last_checkpoint_is_reported_wherever_it_is_read(run: RunFolder) -> None:
    file = run.checkpoints / "step-000004" / ADAPTER_FILE
    content = file.read_bytes()
    try:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        for path in (file, file.parent):
            with pytest.raises(RecipeError, match=r"does not match its checksum.*use another checkpoint"):
                require_adapter(path)
        (file.parent / "manifest.json").rename(run.root / "manifest.json")
        file.write_bytes(content)
        with pytest.raises(RecipeError, match="not listed"):
            require_adapter(file)
    finally:
        (run.root / "manifest.json").rename(file.parent / "manifest.json")
        file.write_bytes(content)
    require_adapter(file)


def test_reading_an_adapter_compares_it_with_its_list(run: RunFolder, tmp_path: Path) -> None:
    """`sample` and the start of a run read with `read_layers`, which must use the bytes that it checks."""
    shutil.copytree(run.adapter, tmp_path / "adapter")
    config = tmp_path / "adapter" / PEFT_CONFIG
    tensors = load_file(tmp_path / "adapter" / ADAPTER_FILE)
    renamed = {name.replace("transformer.", PEFT_PREFIX, 1): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "adapter" / PEFT_FILE)
    config.write_text('{"peft_type": "LORA", "lora_alpha": 4}')
    provenance = tmp_path / "adapter" / PROVENANCE_FILE
    facts = json.loads(provenance.read_text())
    del facts["checksum"]
    facts["files"] |= {file.name: sha256_file(file) for file in (config, tmp_path / "adapter" / PEFT_FILE)}
    provenance.write_text(json.dumps(facts | {"checksum": checksum_of(facts)}))
    for file in (ADAPTER_FILE, PEFT_FILE):
        assert read_layers(tmp_path / "adapter" / file, [])
    config.write_text('{"peft_type": "LORA", "lora_alpha": 5}')
    with pytest.raises(RecipeError, match=f"{PEFT_CONFIG}: does not match its checksum"):
        read_layers(tmp_path / "adapter" / PEFT_FILE, [])
    for file in (ADAPTER_FILE, PEFT_FILE):
        content = bytearray((tmp_path / "adapter" / file).read_bytes())
        content[-1] ^= 1
        (tmp_path / "adapter" / file).write_bytes(content)
        with pytest.raises(RecipeError, match=f"{file}: does not match its checksum"):
            read_layers(tmp_path / "adapter" / file, [])

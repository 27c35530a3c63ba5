"""Tests the cache of packed bases: bitwise identical results, one writer, and no use of damaged entries."""

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import re
import shutil

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from rich.console import Console

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.files.shards import WEIGHTS_FILE, ShardedWeights
from halfbyte.quant.layers.linear4bit import Linear4bit
from halfbyte.quant.layers.quantized_layer import QuantizedLayer
from halfbyte.quant.load import transformer as loading
from halfbyte.trainer.denoiser.load import load_denoiser
from halfbyte.trainer.families.catalog import FAMILIES
from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.families.sd3.family import SD3
from halfbyte.trainer.pretrained import packed_cache as base_cache
from halfbyte.trainer.pretrained.component import pipelines_component
from halfbyte.trainer.pretrained.file_digests import FileDigests
from halfbyte.trainer.pretrained.packed_cache import BaseCache
from halfbyte.trainer.pretrained.pipeline import ModelSource
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.runtime.world import read_world

from judge import stock_bitsandbytes_on_cpu
from probe import prediction
from runs import write_recipe

CPU = torch.device("cpu")
RECIPES = [
    QuantRecipe(),
    QuantRecipe("fp4", double_quant=False),
    QuantRecipe("int8", llm_int8_threshold=4.0),
    QuantRecipe(scale_search="mse"),
    QuantRecipe(skip=("to_q", "norm_out.linear")),
]


@pytest.fixture
def sd3(mini_sd3, tmp_path):
    """A copy of the tiny pipeline that a test may change."""
    return shutil.copytree(mini_sd3, tmp_path / "model")


@pytest.fixture(autouse=True)
def logged(caplog):
    caplog.set_level(logging.INFO, logger="halfbyte")
    return caplog


def cache_in(folder):
    return BaseCache(folder / "bases", FileDigests(folder / "digests"))


def start(model, work, recipe=RECIPES[0], *, revision=None, family=SD3, dtype=torch.bfloat16):
    """Loads a base like a new run does, with a new cache object."""
    source = pipelines_component(ModelSource("we/model", model, revision), "transformer", WEIGHTS_FILE)
    return cache_in(work).load(family.denoiser_class, source, recipe, dtype=dtype, device=CPU)


def entries(work):
    folder = work / "bases"
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []


def reads_of_the_source(monkeypatch):
    """Records the folders that are read from now on."""
    folders = []
    weights = loading.ShardedWeights

    def recorded(folder, *arguments):
        folders.append(folder)
        return weights(folder, *arguments)

    monkeypatch.setattr(loading, "ShardedWeights", recorded)
    return folders


def assert_identical(cold, warm):
    expected, found = cold.state_dict(), warm.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert {n: p.requires_grad for n, p in cold.named_parameters()} == {
        n: p.requires_grad for n, p in warm.named_parameters()
    }
    for path, layer in cold.named_modules():
        if isinstance(layer, QuantizedLayer):
            assert torch.equal(layer.dequantize(), warm.get_submodule(path).dequantize()), path
            assert layer.compute_dtype == warm.get_submodule(path).compute_dtype
    for name, buffer in cold.named_buffers():
        assert torch.equal(buffer, dict(warm.named_buffers())[name]), name
    assert dict(cold.config) == dict(warm.config)
    assert cold.training == warm.training
    assert torch.equal(prediction(cold), prediction(warm))
    cold.eval()


@pytest.mark.parametrize("family", [Flux, SD3])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.quant_type}-{r.scale_search}-{len(r.skip)}")
def test_cold_and_warm_starts_are_bitwise_identical(family, recipe, request, tmp_path, monkeypatch, logged):
    model = request.getfixturevalue("mini_flux" if family is Flux else "mini_sd3")
    cold = start(model, tmp_path, recipe, family=family)
    read = reads_of_the_source(monkeypatch)
    warm = start(model, tmp_path, recipe, family=family)
    assert read == entries(tmp_path), "the second start read more than the cache entry"
    assert_identical(cold, warm)
    assert [record.levelname for record in logged.records if "packed base" in record.message] == ["INFO"] * 2
    assert all(record.levelname == "INFO" for record in logged.records)


def test_stock_diffusers_loads_an_entry(mini_sd3, tmp_path):
    cold = start(mini_sd3, tmp_path)
    with stock_bitsandbytes_on_cpu():
        stock, info = SD3Transformer2DModel.from_pretrained(
            entries(tmp_path)[0], torch_dtype=torch.bfloat16, output_loading_info=True
        )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(prediction(stock), prediction(cold))


def test_each_setting_that_changes_bytes_has_a_separate_entry(mini_sd3, tmp_path):
    others = [QuantRecipe(double_quant=False), QuantRecipe(compute_dtype=torch.float32), QuantRecipe("fp4")]
    for number, recipe in enumerate([*RECIPES, *others], start=1):
        start(mini_sd3, tmp_path, recipe)
        assert len(entries(tmp_path)) == number, recipe
    start(mini_sd3, tmp_path, dtype=torch.float32)
    assert len(entries(tmp_path)) == number + 1


def test_a_new_format_has_separate_entries(mini_sd3, tmp_path, monkeypatch):
    start(mini_sd3, tmp_path)
    monkeypatch.setattr(base_cache, "_FORMAT", base_cache._FORMAT + 1)
    start(mini_sd3, tmp_path)
    assert len(entries(tmp_path)) == 2


def test_an_entry_is_identified_by_the_content_of_the_folder_not_its_path(sd3, tmp_path):
    start(sd3, tmp_path)
    start(shutil.copytree(sd3, tmp_path / "copy"), tmp_path)
    assert len(entries(tmp_path)) == 1
    weights = next((sd3 / "transformer").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    changed = start(sd3, tmp_path)
    assert len(entries(tmp_path)) == 2
    assert_identical(changed, start(sd3, tmp_path))


def test_a_snapshot_is_identified_by_its_commit(mini_sd3, tmp_path):
    start(mini_sd3, tmp_path, revision="a")
    assert not (tmp_path / "digests").exists(), "no file needs a digest"
    start(mini_sd3, tmp_path, revision="a")
    assert len(entries(tmp_path)) == 1
    start(mini_sd3, tmp_path, revision="b")
    assert len(entries(tmp_path)) == 2


def flip_a_byte(entry):
    with ShardedWeights(entry) as weights:
        stored = weights.stored("proj_out.weight")
    content = bytearray((entry / stored.shard).read_bytes())
    content[stored.start + 17] ^= 4
    (entry / stored.shard).write_bytes(content)


def cut_short(entry):
    weights = next(entry.glob("*.safetensors"))
    os.truncate(weights, weights.stat().st_size - 5)


def lose(name):
    return lambda entry: next(entry.glob(name)).unlink()


def rewrite_config(entry):
    config = json.loads((entry / "config.json").read_text())
    config["quantization_config"]["bnb_4bit_quant_type"] = "fp4"
    (entry / "config.json").write_text(json.dumps(config, indent=2))


def break_manifest(text):
    return lambda entry: (entry / "manifest.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        (flip_a_byte, ".safetensors: the content differs"),
        (cut_short, " bytes, expected "),
        (lose("*.safetensors"), "No such file"),
        (lose("config.json"), "No such file"),
        (lose("manifest.json"), "No such file"),
        (rewrite_config, "config.json: "),
        (break_manifest("{"), "manifest.json|Expecting"),
        (break_manifest("[]"), "manifest.json: "),
        (break_manifest('{"files": {}}'), "the content differs"),
    ],
)
def test_a_damaged_entry_is_rebuilt_with_one_warning(mini_sd3, tmp_path, damage, fragment, logged):
    cold = start(mini_sd3, tmp_path)
    (entry,) = entries(tmp_path)
    damage(entry)
    logged.clear()
    again = start(mini_sd3, tmp_path)
    (warning,) = [record.message for record in logged.records if record.levelname == "WARNING"]
    assert f"{entry} is damaged" in warning
    assert any(part in warning for part in fragment.split("|")), warning
    assert_identical(cold, again)
    logged.clear()
    assert_identical(cold, start(mini_sd3, tmp_path))
    assert not [record for record in logged.records if record.levelname == "WARNING"]


def no_space(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("when", ["writing the weights", "writing the manifest", "renaming"])
def test_a_full_disk_causes_one_warning_and_leaves_no_files(mini_sd3, tmp_path, monkeypatch, logged, when):
    with monkeypatch.context() as patch:
        if when == "writing the weights":
            patch.setattr("halfbyte.quant.files.shards._write_shard", no_space)
        elif when == "writing the manifest":
            patch.setattr(base_cache, "_write_manifest", no_space)
        else:
            patch.setattr(base_cache.os, "rename", no_space)
        model = start(mini_sd3, tmp_path)
    assert isinstance(model.transformer_blocks[0].attn.to_q, Linear4bit)
    (warning,) = [record.message for record in logged.records if record.levelname == "WARNING"]
    assert str(tmp_path / "bases") in warning
    assert "No space left" in warning
    assert not [path for path in (tmp_path / "bases").iterdir() if path.is_dir()]
    start(mini_sd3, tmp_path)
    assert len(entries(tmp_path)) == 1


def test_an_entry_that_would_fill_the_disk_is_not_written(mini_sd3, tmp_path, monkeypatch, logged):
    monkeypatch.setattr(
        base_cache.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 10**12, 5 * 10**8)
    )
    start(mini_sd3, tmp_path)
    (warning,) = [record.message for record in logged.records if record.levelname == "WARNING"]
    assert "500.0 MB" in warning
    assert entries(tmp_path) == []


def test_a_folder_that_cannot_be_written_causes_one_warning(mini_sd3, tmp_path, monkeypatch, logged):
    # A file in place of the folder stops root as well. Permissions would not.
    (tmp_path / "bases").write_text("")
    model = start(mini_sd3, tmp_path)
    assert isinstance(model.transformer_blocks[0].attn.to_q, Linear4bit)
    (warning,) = [record.message for record in logged.records if record.levelname == "WARNING"]
    assert str(tmp_path / "bases") in warning


def test_an_entry_in_a_read_only_folder_is_used(mini_sd3, tmp_path, monkeypatch):
    cold = start(mini_sd3, tmp_path)
    real = os.open

    def read_only(path, flags, *mode):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", read_only)
    read = reads_of_the_source(monkeypatch)
    assert_identical(cold, start(mini_sd3, tmp_path))
    assert read == entries(tmp_path)


def test_only_one_of_several_processes_writes(mini_sd3, tmp_path, monkeypatch):
    start(mini_sd3, tmp_path)
    (entry,) = entries(tmp_path)
    shutil.rmtree(entry)
    lock = (tmp_path / "bases" / f".{entry.name}.lock").open()
    fcntl.flock(lock, fcntl.LOCK_EX)  # like another process that is writing the entry
    assert isinstance(start(mini_sd3, tmp_path).transformer_blocks[0].attn.to_q, Linear4bit)
    assert entries(tmp_path) == []
    lock.close()
    start(mini_sd3, tmp_path)
    assert entries(tmp_path) == [entry]


def test_simultaneous_starts_write_one_complete_entry(mini_sd3, tmp_path):
    # Fork: new processes would import for three seconds each and might not overlap.
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=start, args=(mini_sd3, tmp_path)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(entries(tmp_path)) == 1
    assert_identical(start(mini_sd3, tmp_path / "alone"), start(mini_sd3, tmp_path))
    assert not list((tmp_path / "bases").glob("*.tmp"))


@pytest.mark.parametrize("suffix", ["halfbyte.tmp", "tmp"])
def test_the_files_of_a_killed_writer_are_cleared(mini_sd3, tmp_path, suffix):
    start(mini_sd3, tmp_path)
    (entry,) = entries(tmp_path)
    left = entry.with_name(f".{entry.name}.{suffix}")
    entry.rename(left)
    (left / "config.json").unlink()
    start(mini_sd3, tmp_path)
    assert entries(tmp_path) == [entry]
    assert not left.exists()


def test_a_source_that_changes_while_it_is_read_is_not_cached(sd3, tmp_path, monkeypatch, logged):
    file = next((sd3 / "transformer").glob("*.safetensors"))
    load = base_cache.load_quantized

    def changed_meanwhile(*arguments, **options):
        status = file.stat()
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
        return load(*arguments, **options)

    monkeypatch.setattr(base_cache, "load_quantized", changed_meanwhile)
    start(sd3, tmp_path)
    (warning,) = [record.message for record in logged.records if record.levelname == "WARNING"]
    assert f"{sd3 / 'transformer'} changed" in warning
    assert entries(tmp_path) == []


def test_a_base_that_is_already_packed_is_not_cached(mini_sd3, sd3, tmp_path):
    start(mini_sd3, tmp_path / "first")
    (entry,) = entries(tmp_path / "first")
    shutil.rmtree(sd3 / "transformer")
    shutil.copytree(entry, sd3 / "transformer")
    start(sd3, tmp_path / "second")
    assert entries(tmp_path / "second") == []


def test_a_damaged_source_is_an_error_and_nothing_is_cached(sd3, tmp_path):
    weights = next((sd3 / "transformer").glob("*.safetensors"))
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(ValueError, match=re.escape(f"{weights}: ")):
        start(sd3, tmp_path)
    assert entries(tmp_path) == []


def test_a_separate_transformer_is_cached_too(mini_flux, tmp_path, monkeypatch):
    separate = shutil.copytree(mini_flux / "transformer", tmp_path / "separate")
    recipe = load_recipe(write_recipe(tmp_path, mini_flux), [f"model.transformer={separate}"])
    world = read_world({"ACCELERATE_USE_CPU": "true"})
    family = FAMILIES["flux"].open(recipe.model.path, None, None, recipe.model.transformer)
    read = reads_of_the_source(monkeypatch)
    cold = load_denoiser(recipe, family, world, Console(quiet=True)).denoiser
    assert separate in read
    read.clear()
    warm = load_denoiser(recipe, family, world, Console(quiet=True)).denoiser
    assert len(entries(tmp_path / "cache")) == 1
    assert separate not in read
    assert all(torch.equal(value, warm.state_dict()[name]) for name, value in cold.state_dict().items())


@pytest.mark.parametrize("cache_base", ["true", "false"])
def test_a_run_starts_with_the_same_parameters_cold_and_warm(mini_flux, tmp_path, cache_base):
    recipe = load_recipe(write_recipe(tmp_path, mini_flux), [f"model.cache_base={cache_base}"])
    world = read_world({"ACCELERATE_USE_CPU": "true"})
    family = FAMILIES["flux"].open(recipe.model.path, None, None)
    cold, warm = (load_denoiser(recipe, family, world, Console(quiet=True)).denoiser for _ in range(2))
    assert isinstance(cold, FluxTransformer2DModel)
    assert len(entries(tmp_path / "cache")) == (cache_base == "true")
    expected, found = cold.state_dict(), warm.state_dict()
    adapters = [name for name in expected if "lora_A" in name]
    assert adapters
    assert all(expected[name].any() for name in adapters)
    assert list(expected) == list(found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)

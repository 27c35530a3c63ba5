"""Tests the quantization report: its numbers match the quantized layers, and its skip list is correct."""

import json
import shutil

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.convert.replace_linears import convert
from halfbyte.quant.convert.skip_list import is_skipped, linear_layers, skip_list_for, skip_matches
from halfbyte.quant.files.shards import WEIGHTS_FILE
from halfbyte.quant.formats.weight_error import SCHEMES, weight_error
from halfbyte.quant.layers.quantized_layer import QuantizedLayer
from halfbyte.quant.load.serialize import save_quantized
from halfbyte.quant.load.transformer import empty_model, load_quantized, read_config
from halfbyte.trainer.cli.app import app
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.t5 import load_t5
from halfbyte.trainer.quantize.report import SCHEME_NAMES, kind_of, quant_report
from halfbyte.trainer.quantize.report_output import to_json

CPU = torch.device("cpu")
RECIPES = {
    "nf4": QuantRecipe(),
    "nf4 mse": QuantRecipe(scale_search="mse"),
    "fp4": QuantRecipe("fp4"),
    "int8": QuantRecipe("int8"),
}


@pytest.fixture(scope="module")
def report(mini_flux):
    return quant_report(mini_flux, "transformer", device=CPU)


def run(*arguments):
    return CliRunner().invoke(app, ["quant-report", *map(str, arguments)])


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_errors_and_sizes_match_the_layers_used_in_training(report, scheme, mini_flux):
    number = SCHEME_NAMES.index(scheme)
    folder = mini_flux / "transformer"
    plain, quantized = (
        load_quantized(FluxTransformer2DModel, folder, recipe, dtype=torch.bfloat16, device="cpu")
        for recipe in (None, RECIPES[scheme])
    )
    layers = {path: m for path, m in quantized.named_modules() if isinstance(m, QuantizedLayer)}
    assert {layer.name for layer in report.layers} == set(layers)
    for layer in report.layers:
        weight = plain.get_submodule(layer.name).weight.detach().double()
        error = (layers[layer.name].dequantize(torch.float32) - weight).norm() / weight.norm()
        assert layer.error.relative()[number] == pytest.approx(float(error), rel=1e-6)
        assert layer.nbytes[number] == layers[layer.name].weight.nelement()
        assert layer.parameters == weight.numel()
    assert report.total.nbytes[number] == sum(layer.weight.nelement() for layer in layers.values())


def test_layers_are_sorted_by_error_and_kinds_sum_them_up(report):
    errors = [layer.error.relative()[0] for layer in report.layers]
    assert errors == sorted(errors, reverse=True)
    assert kind_of("transformer_blocks.13.attn.to_out.0") == "transformer_blocks.*.attn.to_out.*"
    kinds = {kind.name: kind for kind in report.kinds}
    ends = [layer for layer in report.layers if layer.name.startswith("single") and "proj_out" in layer.name]
    kind = kinds["single_transformer_blocks.*.proj_out"]
    assert kind.layers == len(ends) == 2
    assert kind.parameters == sum(layer.parameters for layer in ends)
    squares = sum(layer.error.squares for layer in ends)
    mean = (sum(layer.error.relative()[0] ** 2 * layer.error.squares for layer in ends) / squares) ** 0.5
    assert kind.error.relative()[0] == pytest.approx(mean)
    assert sum(kind.layers for kind in kinds.values()) == report.total.layers == len(report.layers)
    assert report.total.parameters == sum(kind.parameters for kind in kinds.values())


def test_a_sample_of_rows_gives_nearly_the_same_errors(report, mini_flux):
    sampled = quant_report(mini_flux, "transformer", device=CPU, sample=2048)
    whole = {layer.name: layer for layer in report.layers}
    for layer in sampled.layers:
        assert layer.nbytes == whole[layer.name].nbytes
        assert layer.error.squares < 0.7 * whole[layer.name].error.squares
        assert layer.error.relative() == pytest.approx(whole[layer.name].error.relative(), rel=0.2)
    tiny = quant_report(mini_flux, "transformer", device=CPU, sample=1)
    assert all(0 < layer.error.relative()[0] < 0.2 for layer in tiny.layers)


def test_weights_are_read_one_by_one(mini_flux, monkeypatch):
    seen = []

    def record(weight, name):
        seen.append(name)
        return weight_error(weight, name)

    reported = []
    monkeypatch.setattr("halfbyte.trainer.quantize.report.weight_error", record)
    quant_report(
        mini_flux,
        "transformer",
        device=CPU,
        sample=64,
        progress=lambda done, total: reported.append((done, total)),
    )
    assert reported == [(done, len(seen)) for done in range(1, len(seen) + 1)]


def test_a_weight_of_zeros_has_no_error():
    error = weight_error(torch.zeros(4, 64), "w")
    assert error.relative() == (0.0,) * len(SCHEMES)


class Wide(nn.Module):
    """A model with blocks whose last layer has the same name as the model's last layer."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(64, 64), "down": nn.Linear(64, 64)}) for _ in range(3)
        )
        self.down = nn.Linear(64, 64)


@pytest.mark.parametrize(
    ("wanted", "entries", "out_of_reach"),
    [
        ((), (), {}),
        (("blocks.1.up",), ("blocks.1.up",), {}),
        (("blocks.0.up", "blocks.1.up", "blocks.2.up"), ("up",), {}),
        (("blocks.2.up", "blocks.2.down"), ("blocks.2",), {}),
        (("blocks.0.down", "blocks.1.down", "blocks.2.down", "down"), ("down",), {}),
        (("down",), (), {"down": 3}),
        (("down", "blocks.0.up"), ("blocks.0.up",), {"down": 3}),
    ],
)
def test_a_skip_list_reaches_exactly_the_wanted_layers(wanted, entries, out_of_reach):
    model = Wide()
    skip = skip_list_for(model, wanted)
    assert skip.entries == entries
    assert skip.out_of_reach == out_of_reach
    assert set(skip.layers) == set(wanted) - set(out_of_reach)
    converted = convert(model, QuantRecipe(skip=skip.entries))
    assert set(converted) == {path for path, _ in linear_layers(Wide())} - set(skip.layers)


@pytest.mark.parametrize("model_cls", [FluxTransformer2DModel, SD3Transformer2DModel])
@pytest.mark.parametrize("seed", range(6))
def test_a_skip_list_covers_any_set_of_layers_or_lists_the_rest(model_cls, seed, request):
    name = "mini_flux" if model_cls is FluxTransformer2DModel else "mini_sd3"
    folder = request.getfixturevalue(name) / "transformer"
    model = empty_model(model_cls, read_config(folder), folder)
    paths = [path for path, _ in linear_layers(model)]
    draws = torch.rand(len(paths), generator=torch.Generator().manual_seed(seed))
    wanted = {path for path, draw in zip(paths, draws.tolist(), strict=True) if draw < (seed + 1) / 8}
    skip = skip_list_for(model, wanted)
    skipped = {path for match in skip_matches(model, skip.entries) for path in match.layers}
    assert skipped == set(skip.layers) == {path for path in paths if is_skipped(path, skip.entries)}
    assert skipped | set(skip.out_of_reach) == wanted
    assert not skipped & set(skip.out_of_reach)
    assert len(skip.entries) <= len(wanted)


def test_the_suggestion_has_the_layers_above_the_threshold(report, mini_flux, tmp_path):
    threshold = sorted(layer.error.relative()[2] for layer in report.layers)[-6]
    with_list = quant_report(mini_flux, "transformer", device=CPU, beyond=("fp4", threshold))
    suggestion = with_list.suggestion
    worse = {layer.name for layer in report.layers if layer.error.relative()[2] > threshold}
    assert len(worse) == 5
    assert set(suggestion.skip.layers) | set(suggestion.skip.out_of_reach) == worse
    recipe = QuantRecipe("fp4", skip=suggestion.skip.entries)
    model = load_quantized(
        FluxTransformer2DModel, mini_flux / "transformer", recipe, dtype=torch.bfloat16, device="cpu"
    )
    plain = {path for path, layer in linear_layers(model) if type(layer) is nn.Linear}
    assert plain == set(suggestion.skip.layers)
    nbytes = sum(layer.weight.nelement() * layer.weight.element_size() for _, layer in linear_layers(model))
    assert suggestion.nbytes == nbytes
    written = json.loads(to_json(with_list))["suggestion"]
    assert written["skip"] == list(suggestion.skip.entries)
    assert (written["scheme"], written["bytes"]) == ("fp4", nbytes)


def test_the_command_prints_tables_and_writes_json(mini_flux, tmp_path, report):
    file = tmp_path / "report.json"
    result = run(mini_flux, "--threshold", 0.5, "--worst", 3, "--sample", 0, "--json", file)
    assert result.exit_code == 0, result.output
    assert "FluxTransformer2DModel: 36 linear layers" in result.output
    assert "single_transformer_blocks.*.proj_out" in result.output
    assert "the 3 layers with the largest error in nf4" in result.output
    assert report.layers[2].name in result.output
    assert report.layers[3].name not in result.output.replace(".*.", ".")
    assert "50 % in nf4: quant.skip: []" in result.output
    assert "measuring 36/36" in result.output
    written = json.loads(file.read_text())
    assert [layer["name"] for layer in written["layers"]] == [layer.name for layer in report.layers]
    assert written == json.loads(to_json(report)) | {
        "suggestion": {
            "scheme": "nf4", "threshold": 0.5, "skip": [], "layers": [], "out_of_reach": {}, "parameters": 0,
            "bytes": report.total.nbytes[0],
        }
    }  # fmt: skip


def test_the_command_prints_the_skip_list_and_the_layers_it_cannot_cover(mini_flux, tmp_path):
    folder = shutil.copytree(mini_flux / "transformer", tmp_path / "transformer")
    tensors = load_file(folder / WEIGHTS_FILE)
    # A weight of eight standard deviations in every row doubles the error of the row-wise format.
    for name in ("proj_out.weight", "transformer_blocks.0.attn.to_q.weight"):
        tensors[name][:, 0] = 8 * tensors[name].float().std()
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    result = run(folder, "--scheme", "int8", "--threshold", 0.01)
    assert result.exit_code == 0, result.output
    assert "above 1 % in int8: 1 can be skipped" in result.output
    assert "quant.skip: [transformer_blocks.0.attn.to_q]" in result.output
    (line,) = [line for line in result.output.splitlines() if "'proj_out'" in line]
    assert "skip 2 " in line


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["nowhere"], ("nowhere: no such folder",)),
        (["empty"], ("empty: ", "model_index.json", "config.json")),
        (["flux", "--component", "tokenizer"], ("'tokenizer'; it has ",)),
        (["odd"], ("odd/config.json: ", "'Nothing'", "_class_name")),
        (
            ["flux", "--component", "text_encoder_2", "--threshold", "0.1"],
            ("--threshold: ", "T5EncoderModel", "skip list"),
        ),
        (["quantized"], ("quantized: already quantized",)),
        (["short"], ("1 weights are missing", "proj_out.weight")),
        (
            ["flux", "--threshold", "0.1", "--scheme", "nf5"],
            ("--scheme: got 'nf5', accepted: nf4, nf4 mse, fp4, int8",),
        ),
        (["flux", "--json", "missing/report.json"], ("--json: ", "missing/report.json")),
    ],
)
def test_a_model_that_cannot_be_measured_gives_exit_code_2(
    arguments, facts, mini_flux, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flux").symlink_to(mini_flux)
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"architectures": ["Nothing"]}')
    load = load_quantized(
        FluxTransformer2DModel, mini_flux / "transformer", QuantRecipe(), dtype=torch.bfloat16, device="cpu"
    )
    save_quantized(load, tmp_path / "quantized")
    short = shutil.copytree(mini_flux / "transformer", tmp_path / "short")
    tensors = load_file(short / WEIGHTS_FILE)
    del tensors["proj_out.weight"]
    save_file(tensors, short / WEIGHTS_FILE, {"format": "pt"})
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert result.output.count("error: ") == 1
    assert all(fact in result.output for fact in facts), result.output


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_text_encoders_are_measured_as_they_are_loaded(quant, mini_flux):
    folder = mini_flux / "text_encoder_2"
    report = quant_report(mini_flux, "text_encoder_2", device=CPU)
    assert report.model_class == "T5EncoderModel"
    plain, packed = (
        load_t5(folder, kind, dtype=torch.bfloat16, device=CPU).requires_grad_(False)
        for kind in ("none", quant)
    )
    measured = {layer.name: layer for layer in report.layers}
    assert set(measured) == {path for path, _ in linear_layers(plain)}
    layers = {path: layer for path, layer in packed.named_modules() if isinstance(layer, QuantizedLayer)}
    assert layers
    number = SCHEME_NAMES.index(quant)
    for path, layer in layers.items():
        weight = plain.get_submodule(path).weight.double()
        error = (layer.dequantize(torch.float32) - weight).norm() / weight.norm()
        assert measured[path].error.relative()[number] == pytest.approx(float(error), rel=1e-6)
        assert measured[path].nbytes[number] == layer.weight.nelement()
    assert "CLIPTextModel: " in run(mini_flux, "--component", "text_encoder").output


def test_a_weight_out_of_range_has_no_error_only_with_that_scheme(mini_flux, tmp_path):
    folder = shutil.copytree(mini_flux / "transformer", tmp_path / "transformer")
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors["transformer_blocks.0.attn.to_q.weight"][0, 0] = 1e5  # above the range of fp16, which int8 uses
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    report = run(folder, "--scheme", "int8", "--threshold", 0.02, "--json", tmp_path / "report.json")
    assert report.exit_code == 0, report.output
    assert "n/a" in report.output
    assert "quant.skip: [transformer_blocks.0.attn.to_q]" in report.output
    written = json.loads((tmp_path / "report.json").read_text())
    errors = {layer["name"]: layer["error"] for layer in written["layers"]}
    beyond = errors.pop("transformer_blocks.0.attn.to_q")
    assert beyond["int8"] is None
    assert 0 < beyond["nf4"] < 1
    assert all(0 < error["int8"] < 0.02 for error in errors.values())
    assert written["total"]["error"]["int8"] is None


def test_damaged_weights_are_named(mini_flux, tmp_path):
    folder = shutil.copytree(mini_flux / "transformer", tmp_path / "transformer")
    tensors = load_file(folder / WEIGHTS_FILE)
    name = "transformer_blocks.0.attn.to_q.weight"
    for damaged, message in (
        (tensors[name][:-1].clone(), f"{name}: expected shape"),
        (torch.full_like(tensors[name], float("nan")), f"{name}: .*NaN"),
        (tensors[name].int(), rf"{name}: .*torch\.int32"),
    ):
        save_file(tensors | {name: damaged}, folder / WEIGHTS_FILE, {"format": "pt"})
        with pytest.raises(RecipeError, match=message) as failure:
            quant_report(folder, "transformer", device=CPU)
        assert failure.value.exit_code == 2

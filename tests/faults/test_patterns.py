"""Tests that regular expressions that would match for hours are refused, with their setting."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from halfbyte.trainer.adapters.patterns import refuse_slow
from halfbyte.trainer.adapters.read import read_layers
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.catalog import FAMILIES
from halfbyte.trainer.plan.dry_run import DryRun
from halfbyte.trainer.recipe.load import load_recipe

from runs import write_recipe

# Exponential in the length of a name, and a polynomial of high degree.
SLOW = (r"(([a-z_.0-9]+)+)+!", r"(a|[a-z][a-z]?|[a-z_.0-9])*!", ".*.*.*.*.*.*.*.*.*.*.*.*!")
NAME = "single_transformer_blocks.0.attn.to_q"


@pytest.fixture
def recipe(tmp_path: Path, mini_flux: Path) -> Path:
    return write_recipe(tmp_path, mini_flux)


def dry_run(recipe: Path, override: str) -> DryRun:
    settings = load_recipe(recipe, [override])
    family = FAMILIES["flux"].describe(settings.model.path, None, 24)
    return DryRun(settings, family)


@pytest.mark.parametrize("pattern", SLOW)
def test_a_pattern_that_backtracks_is_refused(pattern: str) -> None:
    with pytest.raises(RecipeError) as refused:
        refuse_slow("lora.targets: got", ["to_q", "to_[kv]+", pattern], [NAME], "fullmatch")
    assert str(refused.value).startswith(f"lora.targets: got {pattern!r}")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("lora.targets", SLOW[0]),
        ("lora.rank_pattern", json.dumps({"to_q": 8, SLOW[0]: 2})),
        ("lora.alpha_pattern", json.dumps({SLOW[0]: 2})),
    ],
)
def test_a_recipes_pattern_is_refused_before_the_encoding(recipe: Path, setting: str, value: str) -> None:
    with pytest.raises(RecipeError) as refused:
        dry_run(recipe, f"{setting}={value}")
    assert str(refused.value).startswith(f"{setting}: got ")
    assert repr(SLOW[0]) in str(refused.value)


def test_patterns_of_common_recipes_are_accepted(recipe: Path) -> None:
    targets = r"(single_)?transformer_blocks\.\d+\..*(to_[qkv]|ff.*proj|add_.+_proj)"
    assert dry_run(recipe, f"lora.targets={targets}").adapters
    assert dry_run(recipe, json.dumps({r"attn.*\.to_[qkv]+": 2}).join(["lora.rank_pattern=", ""])).adapters


@pytest.mark.parametrize("pattern", ["(" * 5000, "a{99999999999}", "[", "(?P<a>x)(?P<a>y)"])
@pytest.mark.parametrize("setting", ["targets", "rank_pattern"])
def test_a_text_that_is_no_pattern_is_a_message(recipe: Path, setting: str, pattern: str) -> None:
    value = json.dumps(pattern) if setting == "targets" else json.dumps({pattern: 2})
    with pytest.raises(RecipeError, match=rf"lora\.{setting}"):
        load_recipe(recipe, [f"lora.{setting}={value}"])


def test_a_pattern_that_is_one_only_at_the_start_is_a_message(recipe: Path) -> None:
    """PEFT puts the pattern into its own, where flags for the whole of it are not allowed."""
    with pytest.raises(RecipeError, match=r"lora\.rank_pattern.*flags"):
        dry_run(recipe, 'lora.rank_pattern={"(?i)to_q": 2}')


@pytest.mark.parametrize("form", ["peft", "diffusers"])
def test_a_downloaded_adapters_pattern_is_refused(tmp_path: Path, mini_flux: Path, form: str) -> None:
    config = {"peft_type": "LORA", "lora_alpha": 4, "alpha_pattern": {SLOW[0]: 8}}
    prefix = "base_model.model." if form == "peft" else "transformer."
    tensors = {f"{prefix}{NAME}.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}
    file = tmp_path / "adapter_model.safetensors"
    save_file(tensors, file, metadata if form == "diffusers" else None)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    family = FAMILIES["flux"].describe(str(mini_flux), None, 24)
    with pytest.raises(RecipeError) as refused:
        read_layers(file, family.original_names())
    assert "has alpha_pattern " in str(refused.value)
    assert str(tmp_path) in str(refused.value)

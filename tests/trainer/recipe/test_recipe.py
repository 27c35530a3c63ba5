"""Recipes: what is read, what is refused, and where the messages point."""

import logging
from pathlib import Path

import pytest
import yaml

from halfbyte.trainer.objective.losses import Huber
from halfbyte.trainer.objective.shift import StaticShift
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.recipe.yaml12 import RecipeLoader, scalar

from small_recipe import SMALL, Write, problems


def test_a_small_recipe_gets_the_documented_defaults(write: Write) -> None:
    recipe = load_recipe(write(SMALL))
    assert recipe.quant.type == "nf4"
    assert recipe.quant.double_quant
    assert recipe.lora.rank == 16
    assert recipe.objective.shift.name == "resolution"
    assert recipe.objective.loss.name == "mse"
    assert recipe.optimizer.lr == 1e-4
    assert recipe.data.cache_folder == Path.home() / ".cache" / "halfbyte"


def test_a_section_with_every_line_commented_out_has_its_defaults(write: Write) -> None:
    recipe = load_recipe(write(SMALL + "train:\n  # steps: 3\nlr_schedule:\n"))
    assert recipe.train.steps == 1000
    assert recipe.lr_schedule.name == "constant"


def test_every_problem_is_reported_at_once_in_order_with_its_line(write: Write) -> None:
    path = write(
        """\
model:
  family: fluxx
  path: name
quant: {type: nf5}
lora:
  rank: 1.5
  lr: 3
  targets: all_linear
data:
  path: ./pictures
  resolution: 1000
objective:
  loss: {name: hubert}
  timesteps: {name: mode, mean: 1}
optimizer:
  name: adamw
  lr: 1e-4x
trian: {steps: 3}
train:
  learning_rate: 3
  seed: -1
output: {dir: out}
"""
    )
    assert problems(path, "train.stepz=10", "sample.steps=many") == [
        "recipe.yaml:2: model.family: got 'fluxx', expected flux or sd3; did you mean 'flux'?",
        "recipe.yaml:3: model.path: got 'name', expected a Hub repository as owner/name,"
        " or a folder with ./, ../, / or ~ in front",
        "recipe.yaml:4: quant.type: got 'nf5', expected nf4, fp4, int8 or none; did you mean 'nf4'?",
        "recipe.yaml:6: lora.rank: got 1.5, expected a whole number, 1 or more",
        "recipe.yaml:7: lora.lr: unknown key; did you mean optimizer.lr?",
        "recipe.yaml:8: lora.targets: got 'all_linear'; did you mean 'all-linear'?",
        "recipe.yaml:11: data.resolution: got 1000, expected a whole number divisible by 16, from 16 to 8192",
        "recipe.yaml:13: objective.loss.name: got 'hubert', expected mse, huber or l1; did you mean 'huber'?",
        "recipe.yaml:14: objective.timesteps.mean: mode has no such setting, only logit_normal has;"
        " expected name or scale",
        "recipe.yaml:17: optimizer.lr: got '1e-4x', expected a positive number",
        "recipe.yaml:18: trian: unknown key; did you mean 'train'?",
        "recipe.yaml:20: train.learning_rate: unknown key;"
        " did you mean optimizer.lr or lr_schedule.warmup_steps?",
        "recipe.yaml:21: train.seed: got -1, expected a whole number, from 0 to 4294967295",
        "command line: train.stepz=10: unknown key; did you mean 'steps'?",
        "command line: sample.steps=many: got 'many', expected a whole number, 1 or more",
    ]


def test_what_must_be_given_is_named_with_its_meaning(write: Write) -> None:
    assert problems(write("train: {steps: 3}\n")) == [
        "recipe.yaml:1: model.family: missing, expected flux or sd3: what kind of model it is",
        "recipe.yaml:1: model.path: missing, expected text: a Hub repository as owner/name, or a folder"
        " (./, ../, / or ~ in front), in diffusers' layout",
        "recipe.yaml:1: data.path: missing, expected a path: a folder of pictures, with captions in"
        " metadata.jsonl or metadata.csv, or in .txt files beside them; or a folder of .parquet files, or one of them",
        "recipe.yaml:1: output.dir: missing, expected a path: the run's folder; a relative path starts from"
        " the current folder",
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train: {steps: yes}", "train.steps: got 'yes', expected a whole number, 1 or more"),
        ("train: {steps: true}", "train.steps: got true, expected a whole number, 1 or more"),
        ("train: {steps: '10'}", "train.steps: got '10', expected a whole number, 1 or more"),
        ("train: {steps: 10.0}", "train.steps: got 10.0, expected a whole number, 1 or more"),
        ("train: {steps: 0}", "train.steps: got 0, expected a whole number, 1 or more"),
        ("train: {max_grad_norm: .nan}", "train.max_grad_norm: got NaN, expected a positive number or null"),
        (
            "train: {max_grad_norm: .inf}",
            "train.max_grad_norm: got Infinity, expected a positive number or null",
        ),
        ("optimizer: {name: adamw, lr: true}", "optimizer.lr: got true, expected a positive number"),
        ("optimizer: {name: adamw, lr: 0}", "optimizer.lr: got 0, expected a positive number"),
        ("optimizer: {lr: 1}", "optimizer: no name given, expected a mapping with a name, as {name: adamw};"),
        ("optimizer: adamw", "optimizer: got 'adamw', expected a mapping with a name, as {name: adamw};"),
        (
            "optimizer: {name: adamw, betas: [0.9, 2]}",
            "optimizer.betas[1]: got 2, expected a number, 0 or more",
        ),
        (
            "optimizer: {name: adamw, betas: [0.9]}",
            "optimizer.betas[1]: missing, expected a number, 0 or more",
        ),
        ("quant: {double_quant: yes}", "quant.double_quant: got 'yes', expected true or false"),
        ("quant: {double_quant: 1}", "quant.double_quant: got 1, expected true or false"),
        ("quant: nf4", "quant: got 'nf4', expected a section of fields"),
        ("quant: {skip: proj_out}", "quant.skip: got 'proj_out', expected a list of texts, as [one, two]"),
        ("sample: {prompts: [a, 3]}", "sample.prompts[1]: got 3, expected text"),
        ("sample: {prompts: ['']}", "sample.prompts[0]: got '', expected text"),
        ("sample: {width: 1000}", "sample.width: got 1000, expected a whole number divisible by 16, from"),
        ("sample: {every: 5}", "sample.every: got 5, expected 0 where sample.prompts is empty"),
        ("lora: {targets: '*'}", "lora.targets: got '*', expected all-linear, attention, a list of module"),
        ("lora: {targets: []}", "lora.targets: got [], expected at least one module name, or all-linear or"),
        ("lora: {targets: 3}", "lora.targets: got 3, expected all-linear or attention, a list of texts,"),
        ("lora: {dropout: 1}", "lora.dropout: got 1, expected a number, 0 or more and less than 1"),
        (
            "lr_schedule: {name: linear, warmup_steps: 1001}",
            "lr_schedule.warmup_steps: got 1001, expected at most",
        ),
        (
            "objective: {shift: {name: resolution, base_tokens: 9, max_tokens: 9}}",
            "objective.shift.max_tokens: got 9, expected more than base_tokens (9)",
        ),
        (
            "objective: {timesteps: {name: mode, scale: 2}}",
            "objective.timesteps.scale: got 2, expected a number,",
        ),
        ("lora: {rank: 4, rank: 8}", "lora.rank: given twice; first on line 4"),
        ("wandb: true", "wandb: unknown key, expected model, quant, lora, data, objective, optimizer,"),
        ("lora: {rank: !!python/name:os.system x}", "lora.rank: a recipe has no tags; leave out"),
        ("? [a]\n: 3", "a key is a single word, not a list or a mapping"),
    ],
)
def test_a_wrong_value_is_named_with_its_line_and_what_is_accepted(
    write: Write, line: str, expected: str
) -> None:
    (problem,) = problems(write(SMALL + line + "\n"))
    assert problem.startswith(f"recipe.yaml:4: {expected}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "recipe.yaml: the recipe is empty, expected sections: model, quant"),
        ("# nothing\n", "recipe.yaml: the recipe is empty"),
        ("- model\n", "recipe.yaml: the recipe holds a list"),
        ("model\n", "recipe.yaml: the recipe holds a single value"),
        ("model:\n\tfamily: flux\n", "recipe.yaml:2: not valid YAML: a tab where"),
        ("model: [1,\n", "recipe.yaml:2: not valid YAML: while parsing a flow"),
        ("model:\n  a: 1\n b: 2\n", "recipe.yaml:3: not valid YAML: "),
        ("a: 1\n---\nb: 2\n", "recipe.yaml:2: not valid YAML: expected a single document"),
        ("a: &x 1\nb: *x\n", "recipe.yaml:2: not valid YAML: a recipe has no aliases"),
        ("a: 1\nb: \x01\n", "recipe.yaml:2: not valid YAML: it does not allow the character U+0001"),
        ("[" * 100_000, "recipe.yaml:1: not valid YAML: nested too deeply"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line(write: Write, text: str, expected: str) -> None:
    (problem,) = problems(write(text))
    assert problem.startswith(expected)


def test_files_that_cannot_be_read(write: Write, tmp_path: Path) -> None:
    write(SMALL)
    assert problems(tmp_path / "recip.yaml") == [
        "recip.yaml: there is no such recipe; did you mean recipe.yaml?"
    ]
    assert problems(tmp_path / "other.yaml") == ["other.yaml: there is no such recipe"]
    assert problems(tmp_path / "pictures") == ["pictures: this is a folder, expected a recipe, a YAML file"]
    (tmp_path / "weights.yaml").write_bytes(b"\xff\xfe\x80\x00")
    assert problems(tmp_path / "weights.yaml") == [
        "weights.yaml: this is no UTF-8 text, expected a recipe, a YAML file"
    ]


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-4", 1e-4), ("1E+2", 100.0), (".5", 0.5), ("1.", 1.0), ("010", 10), ("0x1F", 31), ("0o17", 15)]
    + [(word, word) for word in ("yes", "on", "1:30", "2024-01-01", "1_000", "=", "<<")]
    + [("True", True), ("~", None), ("", None)],
)
def test_plain_values_follow_yaml_1_2_in_files_and_overrides(written: str, value: object) -> None:
    assert scalar(written) == value
    assert type(scalar(written)) is type(value)
    assert (
        yaml.compose(f"- {written}", Loader=RecipeLoader)
        .value[0]
        .tag.endswith({float: "float", int: "int", str: "str", bool: "bool", type(None): "null"}[type(value)])
    )


def test_a_learning_rate_without_a_dot_is_a_number(write: Write) -> None:
    path = write(SMALL + "optimizer: {name: adamw, lr: 1e-4}\n")
    assert load_recipe(path).optimizer.lr == 1e-4
    assert load_recipe(path, ["optimizer.lr=3e-5"]).optimizer.lr == 3e-5
    assert load_recipe(path, ["optimizer.lr=1"]).optimizer.lr == 1.0


def test_overrides_replace_fields_and_the_last_one_wins(write: Write) -> None:
    recipe = load_recipe(
        write(SMALL),
        [
            "train.steps=10",
            "train.steps=20",
            "lora.targets=[to_q, to_k]",
            "train.max_grad_norm=null",
            "objective.shift={name: static, shift: 2}",
            'sample.prompts=["a cat: sitting", a dog]',
        ],
    )
    assert recipe.train.steps == 20
    assert recipe.lora.targets == ("to_q", "to_k")
    assert recipe.train.max_grad_norm is None
    assert recipe.objective.shift == StaticShift(name="static", shift=2.0)
    assert recipe.sample.prompts == ("a cat: sitting", "a dog")


@pytest.mark.parametrize("text", ["a photo of #1", "a: b", "*star", "&x", "!tag", "- a", "a = b", "@x", "%y"])
def test_an_override_without_brackets_is_the_text_itself(write: Write, text: str) -> None:
    assert load_recipe(write(SMALL), [f"data.caption_prefix={text}"]).data.caption_prefix == text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps", "expected section.field=value, as train.steps=10"),
        ("=3", "expected section.field=value, as train.steps=10"),
        ("train..steps=3", "expected section.field=value, as train.steps=10"),
        ("trian.steps=3", "unknown key; did you mean 'train'?"),
        ("steps=3", "unknown key; did you mean train.steps or sample.steps?"),
        ("model.path.x=3", "model.path is a single value and has no fields"),
        ("train={steps: 3}", "a section; set its fields one by one, as train.steps=..."),
        ("sample.prompts=[a, b", "not valid YAML: while parsing a flow sequence"),
        ("optimizer={name: adamw, lr: x}", "lr: got 'x', expected a positive number"),
        ("optimizer={name: adamw, lr: 1, lr: 2}", "lr: given twice"),
        ("objective.loss.name=hubert", "got 'hubert', expected mse, huber or l1; did you mean 'huber'?"),
        ("lora.targetz=", "unknown key; did you mean 'targets'?"),
        ("lora.rank=", "got null, expected a whole number, 1 or more"),
        ("data.caption_prefix=a\udcff", r"got 'a\udcff', expected text"),
    ],
)
def test_a_wrong_override_is_named_as_it_was_given(write: Write, override: str, expected: str) -> None:
    (problem,) = problems(write(SMALL), override)
    assert problem.startswith(f"command line: {override}: {expected}")


def test_a_choice_renamed_keeps_what_fits_and_says_what_it_leaves_out(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(
        SMALL + "lr_schedule: {name: linear, warmup_steps: 5}\nobjective: {loss: {name: huber, delta: 0.3}}\n"
    )
    with caplog.at_level(logging.WARNING):
        recipe = load_recipe(path, ["lr_schedule.name=cosine"])
    assert (recipe.lr_schedule.name, recipe.lr_schedule.warmup_steps) == ("cosine", 5)
    assert caplog.messages == []
    with caplog.at_level(logging.WARNING):
        assert load_recipe(path, ["objective.loss.name=l1"]).objective.loss.name == "l1"
    assert caplog.messages == ["objective.loss: leaving out the recipe's delta, which only huber has"]
    # What the command line itself sets is never left out.
    assert problems(path, "objective.loss.delta=0.2", "objective.loss.name=l1") == [
        "command line: objective.loss.delta=0.2: l1 has no such setting, only huber has; expected name"
    ]
    assert load_recipe(path, ["objective.loss.name=huber"]).objective.loss == Huber(name="huber", delta=0.3)

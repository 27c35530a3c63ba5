"""Tests of loading recipes: values, overrides, and the place and content of error messages."""

import logging
from pathlib import Path

import pytest
import yaml

from halfbyte.trainer.objective.losses import Huber
from halfbyte.trainer.objective.shift import StaticShift
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.recipe.schema import SchemaTree, json_schema
from halfbyte.trainer.recipe.yaml12 import RecipeLoader, scalar
from halfbyte.trainer.wording import printable

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


def test_a_section_with_only_comments_gets_its_defaults(write: Write) -> None:
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
    expected = [
        ("recipe.yaml:2: model.family: ", "'fluxx'", "flux or sd3", "did you mean 'flux'?"),
        ("recipe.yaml:3: model.path: ", "'name'", "owner/name", "./, ../, / or ~"),
        ("recipe.yaml:4: quant.type: ", "'nf5'", "nf4, fp4, int8 or none", "did you mean 'nf4'?"),
        ("recipe.yaml:6: lora.rank: ", "1.5", "whole number", "from 1 to"),
        ("recipe.yaml:7: lora.lr: ", "unknown key", "did you mean optimizer.lr?"),
        ("recipe.yaml:8: lora.targets: ", "'all_linear'", "did you mean 'all-linear'?"),
        ("recipe.yaml:11: data.resolution: ", "1000", "divisible by 16", "16 to 8192"),
        ("recipe.yaml:13: objective.loss.name: ", "'hubert'", "mse, huber or l1", "did you mean 'huber'?"),
        ("recipe.yaml:14: objective.timesteps.mean: mode ", "only logit_normal", "name or scale"),
        ("recipe.yaml:17: optimizer.lr: ", "'1e-4x'", "positive number"),
        ("recipe.yaml:18: trian: ", "unknown key", "did you mean 'train'?"),
        (
            "recipe.yaml:20: train.learning_rate: ",
            "unknown key",
            "did you mean optimizer.lr or lr_schedule.warmup_steps?",
        ),
        ("recipe.yaml:21: train.seed: ", "-1", "0 to 4294967295"),
        ("command line: train.stepz=10: ", "unknown key", "did you mean 'steps'?"),
        ("command line: sample.steps=many: ", "'many'", "whole number", "from 1 to"),
    ]
    lines = problems(path, "train.stepz=10", "sample.steps=many")
    assert len(lines) == len(expected)
    for line, (start, *fragments) in zip(lines, expected, strict=True):
        assert line.startswith(start)
        assert all(fragment in line for fragment in fragments), line


def test_a_missing_required_field_is_named_with_its_meaning(write: Write) -> None:
    tree = SchemaTree(json_schema())
    lines = problems(write("train: {steps: 3}\n"))
    (data,) = [line for line in lines if "data.path" in line]
    lines.remove(data)
    assert data.startswith("recipe.yaml:1: data.path: missing")
    assert "data.sets" in data
    required = [("model", "family"), ("model", "path"), ("output", "dir")]
    accepted = ["flux or sd3", "text", "a path"]
    assert len(lines) == len(required)
    for line, path, accepts in zip(lines, required, accepted, strict=True):
        node = tree.at(path, None)
        assert node is not None
        assert tree.expected(node) == accepts
        assert line.startswith(f"recipe.yaml:1: {'.'.join(path)}: missing")
        assert line.endswith(f"{accepts}: {tree.meaning(node)}")
        assert len(tree.meaning(node)) > 10


@pytest.mark.parametrize(
    ("line", "setting", "fragments"),
    [
        ("train: {steps: yes}", "train.steps", ("'yes'", "whole number", "from 1 to")),
        ("train: {steps: true}", "train.steps", ("true", "whole number", "from 1 to")),
        ("train: {steps: '10'}", "train.steps", ("'10'", "whole number", "from 1 to")),
        ("train: {steps: 10.0}", "train.steps", ("10.0", "whole number", "from 1 to")),
        ("train: {steps: 0}", "train.steps", ("got 0,", "whole number", "from 1 to")),
        ("train: {max_grad_norm: .nan}", "train.max_grad_norm", ("NaN", "positive number or null")),
        ("train: {max_grad_norm: .inf}", "train.max_grad_norm", ("Infinity", "positive number or null")),
        ("optimizer: {name: adamw, lr: true}", "optimizer.lr", ("true", "positive number")),
        ("optimizer: {name: adamw, lr: 0}", "optimizer.lr", ("got 0,", "positive number")),
        ("optimizer: {lr: 1}", "optimizer", ("no name", "{name: adamw}")),
        ("optimizer: adamw", "optimizer", ("'adamw'", "{name: adamw}")),
        (
            "optimizer: {name: adamw, betas: [0.9, 2]}",
            "optimizer.betas[1]",
            ("got 2,", "a number, 0 or more"),
        ),
        ("optimizer: {name: adamw, betas: [0.9]}", "optimizer.betas[1]", ("missing", "a number, 0 or more")),
        ("quant: {double_quant: yes}", "quant.double_quant", ("'yes'", "true or false")),
        ("quant: {double_quant: 1}", "quant.double_quant", ("got 1,", "true or false")),
        ("quant: nf4", "quant", ("'nf4'", "section")),
        ("quant: {skip: proj_out}", "quant.skip", ("'proj_out'", "list of texts", "[one, two]")),
        ("sample: {prompts: [a, 3]}", "sample.prompts[1]", ("got 3,", "text")),
        ("sample: {prompts: ['']}", "sample.prompts[0]", ("''", "text")),
        ("sample: {width: 1000}", "sample.width", ("1000", "divisible by 16")),
        ("sample: {every: 5}", "sample.every", ("got 5,", "expected 0", "sample.prompts")),
        ("lora: {targets: '*'}", "lora.targets", ("'*'", "all-linear, attention", "regular expression")),
        ("lora: {targets: []}", "lora.targets", ("[]", "at least one", "all-linear or attention")),
        ("lora: {targets: 3}", "lora.targets", ("got 3,", "all-linear or attention", "list of texts")),
        ("lora: {dropout: 1}", "lora.dropout", ("got 1,", "0 or more and less than 1")),
        ("lr_schedule: {name: linear, warmup_steps: 1001}", "lr_schedule.warmup_steps", ("1001", "1000")),
        (
            "objective: {shift: {name: resolution, base_tokens: 9, max_tokens: 9}}",
            "objective.shift.max_tokens",
            ("got 9,", "base_tokens"),
        ),
        ("objective: {timesteps: {name: mode, scale: 2}}", "objective.timesteps.scale", ("got 2,", "1.75")),
        ("lora: {rank: 4, rank: 8}", "lora.rank", ("twice", "line 4")),
        ("wandb: true", "wandb", ("unknown key", "model, quant, lora, data, objective, optimizer,")),
        ("lora: {rank: !!python/name:os.system x}", "lora.rank", ("tag", "python/name:os.system")),
        ("? [a]\n: 3", None, ("key", "list or mapping")),
    ],
)
def test_a_wrong_value_is_named_with_its_line_and_what_is_accepted(
    write: Write, line: str, setting: str | None, fragments: tuple[str, ...]
) -> None:
    (problem,) = problems(write(SMALL + line + "\n"))
    assert problem.startswith("recipe.yaml:4: " + ("" if setting is None else f"{setting}: "))
    assert all(fragment in problem for fragment in fragments), problem


@pytest.mark.parametrize(
    ("text", "start", "fragment"),
    [
        ("", "recipe.yaml: ", "empty"),
        ("# nothing\n", "recipe.yaml: ", "empty"),
        ("- model\n", "recipe.yaml: ", "a list"),
        ("model\n", "recipe.yaml: ", "a single value"),
        ("model:\n\tfamily: flux\n", "recipe.yaml:2: not valid YAML: ", "tab"),
        ("model: [1,\n", "recipe.yaml:2: not valid YAML: ", "while parsing a flow"),
        ("model:\n  a: 1\n b: 2\n", "recipe.yaml:3: not valid YAML: ", ""),
        ("a: 1\n---\nb: 2\n", "recipe.yaml:2: not valid YAML: ", "single document"),
        ("a: &x 1\nb: *x\n", "recipe.yaml:2: not valid YAML: ", "aliases"),
        ("a: 1\nb: \x01\n", "recipe.yaml:2: not valid YAML: ", "U+0001"),
        ("[" * 100_000, "recipe.yaml:1: not valid YAML: ", "nested"),
    ],
)
def test_a_file_that_is_not_a_recipe_gives_a_single_line(
    write: Write, text: str, start: str, fragment: str
) -> None:
    (problem,) = problems(write(text))
    assert problem.startswith(start)
    assert fragment in problem


def test_an_empty_recipe_names_the_sections(write: Write) -> None:
    (problem,) = problems(write(""))
    assert "model, quant" in problem


def test_an_unreadable_recipe_file_gives_a_single_line(write: Write, tmp_path: Path) -> None:
    write(SMALL)
    (misspelled,) = problems(tmp_path / "recip.yaml")
    assert misspelled.startswith("recip.yaml: ")
    assert misspelled.endswith("; did you mean recipe.yaml?")
    (absent,) = problems(tmp_path / "other.yaml")
    assert absent.startswith("other.yaml: ")
    assert "did you mean" not in absent
    (folder,) = problems(tmp_path / "pictures")
    assert folder.startswith("pictures: ")
    assert "folder" in folder
    (tmp_path / "weights.yaml").write_bytes(b"\xff\xfe\x80\x00")
    (binary,) = problems(tmp_path / "weights.yaml")
    assert binary.startswith("weights.yaml: ")
    assert "UTF-8" in binary


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


def test_the_last_override_of_a_field_wins(write: Write) -> None:
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
    ("override", "fragments"),
    [
        ("train.steps", ("section.field=value", "train.steps=10")),
        ("=3", ("section.field=value", "train.steps=10")),
        ("train..steps=3", ("section.field=value", "train.steps=10")),
        ("trian.steps=3", ("unknown key", "did you mean 'train'?")),
        ("steps=3", ("unknown key", "did you mean train.steps or sample.steps?")),
        ("model.path.x=3", ("model.path", "single value")),
        ("train={steps: 3}", ("section", "train.steps=...")),
        ("sample.prompts=[a, b", ("not valid YAML: while parsing a flow sequence",)),
        ("optimizer={name: adamw, lr: x}", ("lr: got 'x',", "positive number")),
        ("optimizer={name: adamw, lr: 1, lr: 2}", ("lr: ", "twice")),
        ("objective.loss.name=hubert", ("got 'hubert',", "mse, huber or l1", "did you mean 'huber'?")),
        ("lora.targetz=", ("unknown key", "did you mean 'targets'?")),
        ("lora.rank=", ("got null,", "whole number, from 1 to 16384")),
        ("data.caption_prefix=a\udcff", (r"got 'a\udcff',", "text")),
    ],
)
def test_a_wrong_override_is_named_as_it_was_given(
    write: Write, override: str, fragments: tuple[str, ...]
) -> None:
    (problem,) = problems(write(SMALL), override)
    start = f"command line: {printable(override)}: "
    assert problem.startswith(start)
    assert all(fragment in problem[len(start) :] for fragment in fragments), problem


def test_renaming_a_choice_keeps_shared_settings_and_warns_about_dropped_ones(
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
    (warning,) = caplog.messages
    assert warning.startswith("objective.loss: ")
    assert "delta" in warning
    assert "huber" in warning
    # A setting given on the command line is never dropped: it is an error.
    (problem,) = problems(path, "objective.loss.delta=0.2", "objective.loss.name=l1")
    assert problem.startswith("command line: objective.loss.delta=0.2: l1 ")
    assert "only huber" in problem
    assert load_recipe(path, ["objective.loss.name=huber"]).objective.loss == Huber(name="huber", delta=0.3)

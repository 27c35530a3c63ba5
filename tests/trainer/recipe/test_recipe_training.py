"""Tests that contradictory settings of optimizer, schedule, average and adapter are reported with their line."""

import pytest

from halfbyte.trainer.recipe.load import load_recipe

from small_recipe import SMALL, Write, problems

FREE = "optimizer: {name: schedule_free_adamw}\n"


@pytest.mark.parametrize(
    ("lines", "start", "fragments"),
    [
        (
            FREE + "lr_schedule: {name: cosine}",
            "5: lr_schedule.name: got cosine,",
            ("expected constant", "optimizer.name is schedule_free_adamw", "averages the weights"),
        ),
        (
            FREE + "lr_schedule: {name: cooldown, share: 0.1}",
            "5: lr_schedule.name: got cooldown,",
            ("expected constant",),
        ),
        (
            FREE + "ema: {decay: 0.99}",
            "5: ema.decay: got 0.99,",
            ("expected null", "optimizer.name is schedule_free"),
        ),
        ("ema: {every: 10}", "4: ema.every: got 10,", ("expected 1 ", "ema.decay is null")),
        ("ema: {warmup: false}", "4: ema.warmup: got false,", ("expected true", "ema.decay is null")),
        ("ema: {decay: 1}", "4: ema.decay: got 1,", ("a positive number, less than 1 or null",)),
        (
            "lora: {dora: true}\ntrain: {fused_adapters: false}",
            "5: train.fused_adapters: got false,",
            ("expected true", "lora.dora is true"),
        ),
        (
            "lora: {rank_pattern: {to_q: 0}}",
            "4: lora.rank_pattern.to_q: got 0,",
            ("a whole number, from 1 to 16384",),
        ),
        (
            "lora: {alpha_pattern: {to_q: big}}",
            "4: lora.alpha_pattern.to_q: got 'big',",
            ("a positive number",),
        ),
        ("lora: {rank_pattern: {'(': 2}}", "4: lora.rank_pattern: got ", ("'('", "regular expression")),
        (
            "lora: {rank_pattern: 3}",
            "4: lora.rank_pattern: got 3,",
            ("a mapping", "{name: a whole number,"),
        ),
        ("optimizer: {name: prodigy, growth_rate: 1}", "4: optimizer.growth_rate: got 1,", ("a number",)),
        ("optimizer: {name: adamw, d_coef: 2}", "4: optimizer.d_coef: adamw ", ("only prodigy",)),
        (
            "optimizer: {name: schedule_free_adamw, betas: [0, 0.9]}",
            "4: optimizer.betas[0]: got 0,",
            ("a positive",),
        ),
        ("lr_schedule: {name: cosine, end: 2}", "4: lr_schedule.end: got 2,", ("a number, from 0 to 1",)),
    ],
)
def test_contradictory_settings_are_reported_with_their_line(
    write: Write, lines: str, start: str, fragments: tuple[str, ...]
) -> None:
    (problem,) = problems(write(SMALL + lines + "\n"))
    assert problem.startswith(f"recipe.yaml:{start}")
    assert all(fragment in problem for fragment in fragments), problem


def test_compatible_settings_are_accepted(write: Write) -> None:
    path = write(
        SMALL + FREE + "lr_schedule: {name: constant, warmup_steps: 3}\nlora: {dora: true, rslora: true}\n"
    )
    assert load_recipe(path).optimizer.averages
    overrides = ("optimizer.name=prodigy", "lr_schedule.name=cosine", "ema.decay=0.9")
    recipe = load_recipe(path, overrides)
    assert (recipe.optimizer.name, recipe.optimizer.lr) == ("prodigy", 1.0)
    assert recipe.lr_schedule.falls


def test_patterns_can_be_given_on_the_command_line(write: Write) -> None:
    path = write(SMALL + r"lora: {rank_pattern: {'attn\.to_(q|k)': 8}}" + "\n")
    assert load_recipe(path).lora.rank_pattern == {r"attn\.to_(q|k)": 8}
    assert load_recipe(path, ["lora.rank_pattern={proj_mlp: 2, proj_out: 4}"]).lora.rank_pattern == {
        "proj_mlp": 2,
        "proj_out": 4,
    }
    assert load_recipe(path, ["lora.alpha_pattern.proj_mlp=2"]).lora.alpha_pattern == {"proj_mlp": 2.0}

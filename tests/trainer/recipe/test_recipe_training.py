"""Settings of optimizer, schedule, average and adapter that contradict each other, with the line they stand on."""

import pytest

from halfbyte.trainer.recipe.load import load_recipe

from small_recipe import SMALL, Write, problems

FREE = "optimizer: {name: schedule_free_adamw}\n"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            FREE + "lr_schedule: {name: cosine}",
            "5: lr_schedule.name: got cosine, expected constant where optimizer.name is schedule_free_adamw, which"
            " averages the weights instead",
        ),
        (
            FREE + "lr_schedule: {name: cooldown, share: 0.1}",
            "5: lr_schedule.name: got cooldown, expected constant",
        ),
        (
            FREE + "ema: {decay: 0.99}",
            "5: ema.decay: got 0.99, expected null where optimizer.name is schedule_free",
        ),
        ("ema: {every: 10}", "4: ema.every: got 10, expected 1 where ema.decay is null"),
        ("ema: {warmup: false}", "4: ema.warmup: got false, expected true where ema.decay is null"),
        ("ema: {decay: 1}", "4: ema.decay: got 1, expected a positive number, less than 1 or null"),
        (
            "lora: {dora: true}\ntrain: {fused_adapters: false}",
            "5: train.fused_adapters: got false, expected true where lora.dora is true",
        ),
        (
            "lora: {rank_pattern: {to_q: 0}}",
            "4: lora.rank_pattern.to_q: got 0, expected a whole number, 1 or more",
        ),
        (
            "lora: {alpha_pattern: {to_q: big}}",
            "4: lora.alpha_pattern.to_q: got 'big', expected a positive number",
        ),
        (
            "lora: {rank_pattern: {'(': 2}}",
            "4: lora.rank_pattern: got the pattern '(', expected a regular expression",
        ),
        (
            "lora: {rank_pattern: 3}",
            "4: lora.rank_pattern: got 3, expected a mapping, as {name: a whole number,",
        ),
        ("optimizer: {name: prodigy, growth_rate: 1}", "4: optimizer.growth_rate: got 1, expected a number"),
        (
            "optimizer: {name: adamw, d_coef: 2}",
            "4: optimizer.d_coef: adamw has no such setting, only prodigy has",
        ),
        (
            "optimizer: {name: schedule_free_adamw, betas: [0, 0.9]}",
            "4: optimizer.betas[0]: got 0, expected a positive",
        ),
        ("lr_schedule: {name: cosine, end: 2}", "4: lr_schedule.end: got 2, expected a number, from 0 to 1"),
    ],
)
def test_a_contradiction_is_named_with_its_line(write: Write, lines: str, expected: str) -> None:
    (problem,) = problems(write(SMALL + lines + "\n"))
    assert problem.startswith(f"recipe.yaml:{expected}")


def test_what_fits_together_is_taken(write: Write) -> None:
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

"""Tests of recipes that block, never end or fill the memory: one message that names what is accepted."""

import os
import socket
from pathlib import Path

import pytest

from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.recipe.load import load_recipe

from small_recipe import SMALL, Write, problems

BOMB = "a: &a [x, x]\n" + "".join(f"k{n + 1}: &k{n + 1} [*k{n}, *k{n}]\n" for n in range(20)).replace(
    "*k0", "*a"
)


@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "folder", "loop", "long name"])
def test_what_is_no_file(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket has little room
    path = Path("r.yaml")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path = Path("r" * 5000)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("# comment\n" * 2_000_000, "20,000,000 bytes, expected at most 1,000,000"),
        (SMALL + "sample: {prompts: [" + "a, " * 300_000 + "]}\n", "more than 10,000 keys and values"),
        (
            SMALL + "\n".join(f"key{number}: 1" for number in range(60_000)),
            "more than 10,000 keys and values",
        ),
        (SMALL + "sample: " + "[" * 500_000, "nested too deeply"),
        (SMALL + "sample: " + "{a: " * 200_000, "nested too deeply"),
        (SMALL + "sample:\n" + "".join(" " * depth + "-\n" for depth in range(1, 400)), "nested too deeply"),
        (BOMB, "aliases are not supported"),
        (SMALL + "\x00", "U+0000 is not allowed"),
    ],
)
def test_texts_that_take_long_to_read(write: Write, text: str, fragment: str) -> None:
    (line,) = problems(write(text))
    assert fragment in line
    assert len(line) < 200


def test_a_recipe_just_inside_the_limits_is_read(write: Write) -> None:
    prompts = ", ".join(f"prompt {number}" for number in range(9_900))
    path = write(SMALL + f"sample: {{prompts: [{prompts}]}}\n")
    assert len(load_recipe(path).sample.prompts) == 9_900


def test_very_many_problems_are_counted(write: Write) -> None:
    found = problems(write(SMALL + "".join(f"key{number}: 1\n" for number in range(3000))))
    assert len(found) == 51
    assert found[-1] == "... and 2950 more like these"


@pytest.mark.parametrize(
    ("setting", "accepted"),
    [
        ("train.steps", "from 1 to 100000000"),
        ("train.batch_size", "from 1 to 10000"),
        ("train.grad_accumulation", "from 1 to 1000000"),
        ("data.random_crops", "from 1 to 1000"),
        ("data.resolution", "from 16 to 8192"),
        ("lora.rank", "from 1 to 16384"),
        ("sample.steps", "from 1 to 1000"),
        ("sample.every", "from 0 to 100000000"),
        ("validation.held_out", "from 0 to 1000000"),
        ("validation.every", "from 0 to 100000000"),
        ("checkpoint.every", "from 1 to 100000000"),
        ("checkpoint.keep", "from 1 to 1000000"),
        ("ema.every", "from 1 to 100000000"),
        ("output.log_every", "from 1 to 100000000"),
        ("lr_schedule.warmup_steps", "from 0 to 100000000"),
    ],
)
def test_enormous_numbers_are_refused_with_the_accepted_range(
    write: Write, setting: str, accepted: str
) -> None:
    path = write(SMALL)
    for value in (10**9, 10**18, 10**30):
        (line,) = problems(path, f"{setting}={value}")
        assert setting in line
        assert f"got {value}, " in line
        assert accepted in line


@pytest.mark.parametrize("value", ["9" * 4000, "1e400", "[" * 3000, "{a: " * 3000, '"\\e[31m"'])
def test_values_on_the_command_line(write: Write, value: str) -> None:
    (line,) = problems(write(SMALL), f"train.steps={value}")
    assert "train.steps" in line
    assert line.isprintable()
    assert len(line) < 2200


@pytest.mark.parametrize(
    "setting", ["data.path", "validation.path", "model.path", "output.dir", "data.cache_dir"]
)
def test_a_loop_of_links(write: Write, tmp_path: Path, setting: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "other")
    (tmp_path / "other").symlink_to(tmp_path / "loop")
    lines = problems(write(SMALL), f"{setting}={tmp_path / 'loop'}")
    assert len(lines) == 1
    assert "loop" in lines[0]


def test_control_characters_are_shown_escaped(write: Write) -> None:
    text = SMALL + '"key\\e]0;title\\a": 1\nlora: {targets: "a\\e[2J\\u202e("}\nquant: {type: "n\\u009bf4"}\n'
    found = problems(write(text))
    assert len(found) == 3
    assert all(line.isprintable() for line in found), found
    assert r"key\x1b]0;title\x07" in found[0] + found[1] + found[2]


def test_control_characters_in_the_name_of_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "r\x1b[31m\n.yaml")
    assert str(caught.value).isprintable()

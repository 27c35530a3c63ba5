"""Tests that tokenizers with missing or damaged files are refused, as captions would become unknown tokens."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from opened_model import LFS_POINTER, copy_of, edit_json, open_and_encode, replace
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split
from transformers import CLIPTokenizer

from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.catalog import FAMILIES
from halfbyte.trainer.families.stock_parts import load_tokenizers


def slow_clip(model: Path) -> None:
    """Stores CLIP's tokenizer as FLUX.1-dev does: vocab.json and merges.txt."""
    file = model / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["merges"]]
    replace(file.with_name("vocab.json"), json.dumps(content["vocab"]))
    replace(file.with_name("merges.txt"), "\n".join(["#version: 0.2", *merges]) + "\n")
    file.unlink()


def without_merges(model: Path) -> None:
    slow_clip(model)
    (model / "tokenizer/merges.txt").unlink()


def without_vocabulary(model: Path) -> None:
    slow_clip(model)
    (model / "tokenizer/vocab.json").unlink()


def unlink(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def with_vocabulary_of_other_words(model: Path) -> None:
    """Keeps the special tokens of T5 only, so each word is unknown."""

    def drop(content: dict) -> None:  # type: ignore[type-arg]
        vocabulary = content["model"]["vocab"]
        content["model"]["vocab"] = [
            [word, score] if number < 3 else [f"§{number}", score]
            for number, (word, score) in enumerate(vocabulary)
        ]

    edit_json(model / "tokenizer_2/tokenizer.json", drop)


MISSING: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "CLIP's configuration only": (unlink("tokenizer/tokenizer.json"), "tokenizer", "tokenizer.json"),
    "T5's configuration only": (unlink("tokenizer_2/tokenizer.json"), "tokenizer_2", "spiece.model"),
    "no merges": (without_merges, "tokenizer", "merges.txt"),
    "no vocabulary": (without_vocabulary, "tokenizer", "vocab.json"),
    "no configuration": (unlink("tokenizer/tokenizer_config.json"), "tokenizer", "tokenizer_config.json"),
    "Git LFS": (
        lambda model: replace(model / "tokenizer_2/tokenizer.json", LFS_POINTER),
        "tokenizer_2",
        "git lfs pull",
    ),
}


@pytest.mark.parametrize("fault", MISSING)
def test_a_missing_file_is_named_when_the_model_is_opened(
    tmp_path: Path, mini_flux: Path, fault: str
) -> None:
    model = copy_of(mini_flux, tmp_path / "model")
    damage, folder, expected = MISSING[fault]
    damage(model)
    with pytest.raises(RecipeError) as refused:
        FAMILIES["flux"].open(str(model), None, 24)
    message = str(refused.value)
    assert message.startswith(f"model.path: {model / folder}")
    assert expected in message


DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "other words": (with_vocabulary_of_other_words, "knows no word"),
    "cut": (
        lambda model: replace(
            model / "tokenizer_2/tokenizer.json", (model / "tokenizer_2/tokenizer.json").read_bytes()[:-999]
        ),
        "no T5Tokenizer can be loaded",
    ),
    "a list": (
        lambda model: replace(model / "tokenizer/tokenizer.json", "[]"),
        "no CLIPTokenizer can be loaded",
    ),
    "deep": (
        lambda model: replace(model / "tokenizer/tokenizer.json", "[" * 100_000),
        "no CLIPTokenizer can be loaded",
    ),
    "no length": (
        lambda model: edit_json(
            model / "tokenizer/tokenizer_config.json", lambda c: c.pop("model_max_length")
        ),
        "takes 77 tokens",
    ),
    "a new start token": (
        lambda model: edit_json(
            model / "tokenizer/tokenizer_config.json", lambda c: c.update(bos_token="own")
        ),
        "knows 768 tokens",
    ),
    "tokens of a larger model": (
        lambda model: edit_json(
            model / "tokenizer/tokenizer.json",
            lambda c: c["model"]["vocab"].update({k: v + 9000 for k, v in c["model"]["vocab"].items()}),
        ),
        "knows 768 tokens",
    ),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_damaged_tokenizer_is_refused_before_anything_is_encoded(
    tmp_path: Path, mini_flux: Path, fault: str
) -> None:
    model = copy_of(mini_flux, tmp_path / "model")
    damage, expected = DAMAGED[fault]
    damage(model)
    with pytest.raises(RecipeError) as refused:
        open_and_encode("flux", model, tmp_path / "memo")
    assert str(refused.value).startswith(f"model.path: {model}/tokenizer")
    assert expected in str(refused.value)


def test_a_tokenizer_in_separate_files_gives_the_same_embeddings(tmp_path: Path, mini_flux: Path) -> None:
    model = copy_of(mini_flux, tmp_path / "model")
    slow_clip(model)
    text, _ = open_and_encode("flux", model, tmp_path / "memo")
    expected, _ = open_and_encode("flux", mini_flux, tmp_path / "memo")
    assert torch.equal(text.pooled_prompt_embeds, expected.pooled_prompt_embeds)


HOSTILE = "(a+a+)+y"  # tries every way to split a row of a's


@pytest.mark.parametrize("place", ["pre_tokenizer", "normalizer"])
def test_regular_expressions_in_a_tokenizers_file_do_not_run(
    tmp_path: Path, mini_flux: Path, place: str
) -> None:
    model = copy_of(mini_flux, tmp_path / "model")
    pattern = {"pattern": {"Regex": HOSTILE}}
    steps = {
        "pre_tokenizer": {"type": "Split", **pattern, "behavior": "Isolated", "invert": False},
        "normalizer": {"type": "Replace", **pattern, "content": "b"},
    }
    for name in ("tokenizer", "tokenizer_2"):
        edit_json(model / name / "tokenizer.json", lambda content: content.update({place: steps[place]}))
    family, plain = (FAMILIES["flux"].open(str(folder), None, 24) for folder in (model, mini_flux))
    ours, expected = load_tokenizers(family), load_tokenizers(plain)
    for name, tokenizer in ours.items():
        assert HOSTILE not in tokenizer.backend_tokenizer.to_str()
        for text in ("a" * 60, "a photo of  a dog"):
            assert tokenizer(text).input_ids == expected[name](text).input_ids


def test_a_tokenizer_with_another_regular_expression_is_refused(
    mini_flux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a version of transformers takes from the file."""
    tokenizer = CLIPTokenizer.from_pretrained(mini_flux / "tokenizer")
    tokenizer.backend_tokenizer.pre_tokenizer = Split(Regex(HOSTILE), "isolated")
    monkeypatch.setattr(CLIPTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    with pytest.raises(RecipeError, match="regular expression") as refused:
        load_tokenizers(FAMILIES["flux"].open(str(mini_flux), None, 24))
    assert HOSTILE in str(refused.value)
    assert str(mini_flux / "tokenizer") in str(refused.value)

"""Tests of the choice of files of a Hub data set, by its card and by names."""

import pytest

from halfbyte.trainer.data.archives.hub_files import Choice, chosen_files

PLAIN = ["README.md", ".gitattributes", "data/train-0.parquet", "data/test-0.parquet", "extra/x.parquet"]
CARD = {
    "configs": [
        {"config_name": "small", "data_files": "data/test-*"},
        {
            "config_name": "large",
            "default": True,
            "data_files": [
                {"split": "train", "path": ["data/train-*", "extra/*"]},
                {"split": "dev", "path": "**/x.parquet"},
            ],
        },
    ]
}


@pytest.mark.parametrize(
    ("card", "choice", "found"),
    [
        ({}, Choice(), ["data/train-0.parquet"]),
        ({}, Choice(split="test"), ["data/test-0.parquet"]),
        ({}, Choice(inner="extra"), ["extra/x.parquet"]),
        ({}, Choice(inner="data/t*.parquet", split="test"), ["data/test-0.parquet"]),
        (CARD, Choice(), ["data/train-0.parquet", "extra/x.parquet"]),
        (CARD, Choice(split="dev"), ["extra/x.parquet"]),
        (CARD, Choice(config="small"), ["data/test-0.parquet"]),
        ({"configs": [{"config_name": "a", "data_dir": "extra"}]}, Choice(), ["extra/x.parquet"]),
    ],
)
def test_files_that_are_chosen(card: dict[str, object], choice: Choice, found: list[str]) -> None:
    assert [name for name in chosen_files(PLAIN, card, choice) if name.endswith(".parquet")] == found


@pytest.mark.parametrize(
    ("card", "choice", "problem"),
    [
        ({}, Choice(split="dev"), "has no split 'dev', expected train or test"),
        ({}, Choice(config="a"), "no configuration 'a'"),
        ({}, Choice(inner="none"), "no files that match 'none'"),
        (CARD, Choice(config="a"), "expected small or large"),
        ({"configs": [{"config_name": "a"}, {"config_name": "b"}]}, Choice(), "set config"),
        (CARD, Choice(split="test"), "expected train or dev"),
    ],
)
def test_choices_that_are_refused(card: dict[str, object], choice: Choice, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        chosen_files(PLAIN, card, choice)


def test_without_splits_all_files_are_chosen() -> None:
    assert chosen_files(["b.tar", "a.tar"], {}, Choice()) == ["a.tar", "b.tar"]
    with pytest.raises(ValueError, match="none, because it has no splits"):
        chosen_files(["a.tar"], {}, Choice(split="train"))
    with pytest.raises(ValueError, match="validation, test; set split"):
        chosen_files(["val/a.tar", "test/a.tar"], {}, Choice())

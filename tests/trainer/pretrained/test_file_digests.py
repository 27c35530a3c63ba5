"""Tests remembered digests: they hold only for the unchanged file, and a failure to store one is only a warning."""

import logging
import os

import pytest

from halfbyte.quant.files.digest import file_digest
from halfbyte.trainer.pretrained import file_digests
from halfbyte.trainer.pretrained.file_digests import FileDigests


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"weights" * 1000)
    return path


@pytest.fixture
def digests(tmp_path):
    return FileDigests(tmp_path / "memo")


def later(file):
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def test_a_digest_is_remembered_and_the_file_is_not_read_again(file, digests, monkeypatch):
    assert digests.known(file) is None
    assert digests.of(file) == file_digest(file)
    monkeypatch.setattr(file_digests, "file_digest", None)
    assert digests.of(file) == digests.known(file) == file_digest(file)


def test_a_file_that_changed_is_read_again(file, digests):
    before = digests.of(file)
    file.write_bytes(b"Weights" * 1000)
    later(file)
    assert digests.known(file) is None
    assert digests.of(file) not in (None, before)


def test_the_digest_of_a_file_that_changed_while_it_was_read_is_not_remembered(file, digests):
    status = file.stat()
    later(file)
    digests.remember(file, status, "0" * 64)
    assert digests.known(file) is None
    digests.remember(file, file.stat(), "0" * 64)
    assert digests.known(file) == "0" * 64


def test_a_truncated_digest_is_ignored(file, digests, tmp_path):
    digest = digests.of(file)
    (memo,) = (tmp_path / "memo").iterdir()
    memo.write_text(digest[:30])
    assert digests.known(file) is None
    assert digests.of(file) == digests.known(file) == digest


def test_a_digest_that_cannot_be_stored_causes_one_warning(file, digests, tmp_path, caplog):
    (tmp_path / "memo").write_text("")
    with caplog.at_level(logging.WARNING):
        assert digests.of(file) == file_digest(file)
    (record,) = caplog.records
    assert str(file) in record.message

"""Tests that damaged and hostile tar files are refused with their name and the reason."""

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from halfbyte.trainer.data.archives import tar as tars
from halfbyte.trainer.data.sources.caption_style import CaptionStyle
from halfbyte.trainer.data.sources.contents import sample_bytes
from halfbyte.trainer.data.sources.reading import read_samples
from halfbyte.trainer.errors import DataError


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (24, 16), "red").save(stream, "PNG")
    return stream.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, "/etc/passwd"
    tar.addfile(info, io.BytesIO(data))


def written(path: Path, change: Callable[[tarfile.TarFile], None] = lambda tar: None) -> Path:
    with tarfile.open(path, "w") as tar:
        add(tar, "a.png", png())
        add(tar, "b.png", png())
        change(tar)
    return path


def complaint(path: Path) -> list[str]:
    with pytest.raises(DataError) as caught:
        read_samples(path, CaptionStyle("x"))
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("l.png", tarfile.SYMTYPE, "a symbolic link"),
        ("l.png", tarfile.LNKTYPE, "a hard link"),
        ("d.png", tarfile.CHRTYPE, "a device"),
        ("f.png", tarfile.FIFOTYPE, "a named pipe"),
        ("x.png", b"Z", "of an unknown kind"),
        ("../c.png", tarfile.REGTYPE, "without .."),
        ("a/../../c.png", tarfile.REGTYPE, "without .."),
        ("/etc/c.png", tarfile.REGTYPE, "a relative name"),
        ("a.png", tarfile.REGTYPE, "twice"),
        ("./a.png", tarfile.REGTYPE, "twice"),
    ],
)
def test_members_that_are_refused(tmp_path: Path, name: str, kind: bytes, reason: str) -> None:
    path = written(tmp_path / "a.tar", lambda tar: add(tar, name, kind=kind))
    (line,) = complaint(path)
    assert line.startswith(str(path))
    assert reason in line


def test_a_sparse_file(tmp_path: Path) -> None:
    info = tarfile.TarInfo("s.png")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "s.png"}
    info.pax_headers["GNU.sparse.realsize"] = "1000000"
    data = b"1\n0\n1\n".ljust(512, b"\0") + b"x"
    info.size = len(data)
    path = written(tmp_path / "a.tar", lambda tar: tar.addfile(info, io.BytesIO(data)))
    (line,) = complaint(path)
    assert "a sparse file" in line


def test_compressed_files(tmp_path: Path) -> None:
    data = written(tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(gzip.compress(data))
    (line,) = complaint(tmp_path)
    assert line.startswith(f"{tmp_path / 'a.tar'}: is compressed with gzip")
    assert "gunzip" in line
    (tmp_path / "a.tar").rename(tmp_path / "a.tar.gz")
    (line,) = complaint(tmp_path)
    assert line.startswith(f"{tmp_path / 'a.tar.gz'}: is compressed")


def test_each_truncation_is_noticed(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tar")
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    for length in range(0, end + 1, 128):
        path.write_bytes(data[:length])
        lines = complaint(path)
        assert all(line.startswith(str(path)) for line in lines), lines
    path.write_bytes(data[: end + 512])  # one block of zeros is enough
    assert len(read_samples(path, CaptionStyle("x"))) == 2


def test_damaged_bytes_never_give_other_samples(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tar")
    data = path.read_bytes()
    intact = [one.sha256 for one in read_samples(path, CaptionStyle("x"))]
    for place in range(0, 512, 7):
        damaged = bytearray(data)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            found = [one.sha256 for one in read_samples(path, CaptionStyle("x"))]
        except DataError:
            continue
        assert found == intact


def test_joined_files(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tar")
    path.write_bytes(path.read_bytes() * 2)
    (line,) = complaint(path)
    assert "after its end mark" in line


def test_headers_that_would_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long name of 100 GB, a chain of headers, and too many members."""
    path = tmp_path / "a.tar"
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 10**11
    with path.open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(10**11 + 5000)  # takes no space on the disk
    (line,) = complaint(path)
    assert line.startswith(f"{path}: ")
    assert "a header has 100,000,000,000 bytes" in line
    info.size = 10
    path.write_bytes((info.tobuf(tarfile.GNU_FORMAT) + b"x".ljust(512, b"\0")) * 20_000)
    (line,) = complaint(path)
    assert line.startswith(f"{path}: ")
    monkeypatch.setattr(tars, "MOST_MEMBERS", 10)
    written(path, lambda tar: [add(tar, f"{number}.cls") for number in range(20)])
    (line,) = complaint(path)
    assert "more than 10 files" in line


def test_two_images_of_one_name(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tar", lambda tar: add(tar, "a.PNG", png()))
    (line,) = complaint(path)
    assert "same name as" in line


def test_a_tar_file_that_changes_later(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tar")
    samples = read_samples(path, CaptionStyle("x"))
    data = path.read_bytes()
    path.write_bytes(data[:1000])
    with pytest.raises(DataError, match="has become shorter"):
        sample_bytes(samples[1])
    path.write_bytes(data.replace(b"IDAT", b"IDAX"))
    with pytest.raises(DataError, match=r"a\.tar/b\.png: changed since"):
        sample_bytes(samples[1])


def test_control_characters_in_names(tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\x9b31m\u202e\n\r"
    path = written(tmp_path / "a.tar", lambda tar: add(tar, f"{evil}.png", b"junk"))
    lines = complaint(path)
    assert all(line.isprintable() for line in lines)

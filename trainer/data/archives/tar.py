"""Reads the index of a tar file (a WebDataset shard): the name, the place and the size of each member.

Nothing is extracted. Members are read at their place later, so a tar file must not be compressed, and everything that
is not a plain file is refused.
"""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from halfbyte.quant.files.regular import Opener, open_regular
from halfbyte.trainer.data.records.problems import Problems
from halfbyte.trainer.wording import shown

SUFFIX = ".tar"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

_FILE_BYTES = 2**50  # only the index and single members are read
_HEADER_BYTES = 2**20  # of a long name or of extended headers, which are read as a whole
MOST_MEMBERS = 4_000_000
_BLOCK = 512
_PADDING = 10_240  # tar files end with zeros up to a multiple of this

_PACKERS = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}
_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a named pipe",
}
_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class Member(NamedTuple):
    """The place of a member's bytes in its tar file."""

    start: int
    size: int  # bytes


class _TooLargeHeader(ValueError):
    pass


class _TarInfo(tarfile.TarInfo):
    """A header whose extension is read only if it is small: tarfile reads it as a whole."""

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        if self.type in _EXTENDED and not 0 <= self.size <= _HEADER_BYTES:
            raise _TooLargeHeader(
                f"a header has {self.size:,} bytes, expected at most {_HEADER_BYTES:,}; pack the files again"
            )
        return super()._proc_member(tar)  # type: ignore[misc]


def read_index(path: Path, problems: Problems) -> dict[str, Member]:
    """Returns the members of a tar file by name, without folders; adds everything unusable to `problems`."""
    found: dict[str, Member] = {}
    try:
        with open_regular(path, _FILE_BYTES) as file:
            packer = next((one for magic, one in _PACKERS.items() if _starts_with(file, magic)), None)
            if packer is not None:
                problems.add(
                    path,
                    f"is compressed with {packer[0]}, so its members cannot be read at their place; unpack it with"
                    f" {packer[1]}",
                )
                return {}
            with tarfile.open(fileobj=file, mode="r:", tarinfo=_TarInfo) as tar:
                size = _file_size(file)
                for info in tar:
                    tar.members = []  # type: ignore[attr-defined]  # tarfile keeps all of them
                    _add(path, info, size, found, problems)
                    if len(found) > MOST_MEMBERS:
                        problems.add(
                            path, f"has more than {MOST_MEMBERS:,} files; split it into several tar files"
                        )
                        return {}
                _check_end(path, file, tar.offset, problems)  # type: ignore[attr-defined]
    except OSError as error:
        problems.add(path, f"cannot be read: {error.strerror or error}")
    except (tarfile.TarError, _TooLargeHeader) as error:
        problems.add(path, f"is not an intact tar file: {error}")
    except (ValueError, RecursionError, OverflowError) as error:  # from damaged headers
        problems.add(path, f"has an unusable header: {error}")
    return found


def _starts_with(file: BinaryIO, magic: bytes) -> bool:
    file.seek(0)
    found = file.read(len(magic)) == magic
    file.seek(0)
    return found


def _file_size(file: BinaryIO) -> int:
    here = file.tell()
    size = file.seek(0, io.SEEK_END)
    file.seek(here)
    return size


def _add(path: Path, info: tarfile.TarInfo, size: int, found: dict[str, Member], problems: Problems) -> None:
    """Adds a member to the index, or the reason why it cannot be used to `problems`."""
    if info.isdir():
        return
    name = info.name
    if "/" in name or name in ("", ".", ".."):
        pure = PurePosixPath(name)
        name = "" if pure.is_absolute() or ".." in pure.parts or not pure.parts else str(pure)
    where = f"{path}/{info.name}"
    if not info.isreg() or info.issparse():
        kind = "a sparse file" if info.issparse() else _KINDS.get(info.type, "of an unknown kind")
        problems.add(where, f"is {kind} in a tar file, expected a plain file; pack the files again")
    elif not name or "\0" in name:
        problems.add(path, f"names a member {shown(info.name)}, expected a relative name without ..")
    elif info.size < 0 or info.offset_data + info.size > size:
        problems.add(where, f"should have {info.size:,} bytes, but its tar file ends before; copy it again")
    elif name in found:
        problems.add(where, "is in the tar file twice; pack the files again")
    else:
        found[name] = Member(info.offset_data, info.size)


def _check_end(path: Path, file: BinaryIO, end: int, problems: Problems) -> None:
    """Adds a problem if the tar file has no end mark, or more files after it."""
    size = _file_size(file)
    file.seek(end)
    mark = file.read(_BLOCK)
    if mark.strip(b"\0") or len(mark) < _BLOCK:
        problems.add(path, "is not an intact tar file: it has no end mark; it is truncated, copy it again")
        return
    while end < size:
        file.seek(end)
        rest = file.read(_PADDING)
        if rest.strip(b"\0"):
            problems.add(
                path,
                "has data after its end mark, as tar files that were joined have; pack the files into one tar file",
            )
            return
        end += max(len(rest), 1)


def opener_of(path: Path, members: Mapping[str, Member]) -> Opener:
    """Returns a function that opens members by their path, as if the tar file were a folder."""

    def opened(member: Path, limit: int) -> BinaryIO:
        start, size = members[member.relative_to(path).as_posix()]
        if size > limit:
            raise OSError(None, f"has {size:,} bytes, expected at most {limit:,}")
        with open_regular(path, _FILE_BYTES) as file:
            file.seek(start)
            return io.BytesIO(file.read(size))

    return opened

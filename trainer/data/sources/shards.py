"""Images in tar files (WebDataset): those of one name belong together, a.jpg with a.txt, a.json and a.mask.png."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from halfbyte.trainer.data.archives.tar import Member, opener_of, read_index
from halfbyte.trainer.data.pictures.decode import PICTURE_SUFFIXES
from halfbyte.trainer.data.records.problems import Problems
from halfbyte.trainer.data.records.sample import Place
from halfbyte.trainer.data.sources.found import Found
from halfbyte.trainer.data.sources.left_out import LeftOut
from halfbyte.trainer.data.sources.masks import mask_name
from halfbyte.trainer.data.sources.picture_captions import Listing, own_captions


@dataclass(frozen=True)
class TarSource:
    """The members of tar files."""

    root: Path
    shards: Sequence[Path]
    masks: bool = False  # masks are read
    lines: bool = False  # each line of a text file is a caption

    @cached_property
    def total(self) -> int:
        """The number of images, estimated from the first tar file."""
        members = read_index(self.shards[0], Problems())
        images = sum(name.lower().endswith(PICTURE_SUFFIXES) for name in members)
        sizes = [shard.stat().st_size for shard in self.shards]
        return round(images * sum(sizes) / max(sizes[0], 1))

    def items(self, shard: Path, problems: Problems, left_out: LeftOut) -> Iterator[Found]:
        """Yields the images of a tar file in the order of their names, see `Source`."""
        members = read_index(shard, problems)
        files = sorted((shard / name for name in members), key=lambda file: file.as_posix())
        pictures = [file for file in files if file.suffix.lower() in PICTURE_SUFFIXES]
        if not pictures and len(problems) == 0:
            problems.add(shard, f"has no images; accepted: {', '.join(PICTURE_SUFFIXES)}")
        listing = Listing(shard, files, pictures, opener_of(shard, members))
        captions = own_captions(listing, problems, left_out, lines=self.lines)
        masks = self._masks(pictures)
        stems: dict[Path, Path] = {}
        for picture, own in captions.items():
            other = stems.setdefault(picture.with_suffix(""), picture)
            if other is not picture:
                problems.add(
                    picture, f"has the same name as {other.name} in this tar file; rename one of them"
                )
                continue
            mask = masks.get(picture.with_suffix(""))
            yield Found(
                _place(shard, picture, members),
                () if own is None else own.texts,
                None if mask is None else _place(shard, mask, members),
            )
            if mask is not None:
                left_out.reasons.pop(mask, None)  # it is used

    def _masks(self, pictures: Sequence[Path]) -> dict[Path, Path]:
        """Returns the masks by the names of their images, without suffix."""
        if not self.masks:
            return {}
        named = ((mask_name(picture), picture) for picture in reversed(pictures))
        return {name: picture for name, picture in named if name is not None}


def _place(shard: Path, file: Path, members: Mapping[str, Member]) -> Place:
    name = file.relative_to(shard).as_posix()
    return Place(shard, None, name, *members[name])

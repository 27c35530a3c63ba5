"""The readers of files that users download or write by hand, each as a function of a file's bytes, for fuzzing."""

import io
import json
import struct
import tarfile
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]
import torch
from safetensors.torch import save

from halfbyte.quant.files.shards import ShardedWeights
from halfbyte.trainer.adapters.read import read_layers
from halfbyte.trainer.adapters.saved import METADATA
from halfbyte.trainer.data.sources.caption_style import CaptionStyle
from halfbyte.trainer.data.sources.contents import sample_bytes
from halfbyte.trainer.data.sources.reading import read_samples
from halfbyte.trainer.errors import HalfbyteError
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.run_folder.saved_state import read_state

CORPUS = Path(__file__).parent / "corpus"
"""One folder per reader, with the inputs that reached new code when they were found."""

LONGEST = 4096
"""The most bytes of an input."""

# The smallest image that Pillow writes: 1 by 1 pixel.
_PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8cfc0000003010100"
    "c9fe92ef0000000049454e44ae426082"
)


_BIDIRECTIONAL = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class Leak(AssertionError):
    """A reader did what no input may make it do."""


def _is_obeyed(character: str) -> bool:
    """Returns True for characters that a terminal obeys, or that change the order of others on the screen."""
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _BIDIRECTIONAL


@dataclass(frozen=True)
class Reader:
    """A reader with valid inputs to begin with."""

    read: Callable[[bytes, Path], object]  # gets the input, and an empty folder to put it in
    seeds: tuple[bytes, ...]

    def check(self, content: bytes, folder: Path) -> bool:
        """Reads an input; returns True if it was accepted.

        Raises:
            Leak: the message has control characters, or is enormous. Any other error of the reader passes through.
        """
        try:
            self.read(content, folder)
        except HalfbyteError as error:
            lines = str(error).splitlines()
            if any(_is_obeyed(character) for line in lines for character in line):
                raise Leak(f"control characters in {lines!r}") from error
            if len(str(error)) > 20 * LONGEST:
                raise Leak(f"a message of {len(str(error))} characters") from error
            return False
        return True


def _recipe(content: bytes, folder: Path) -> None:
    for name in ("pictures", "others"):
        (folder / name).mkdir(exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_bytes(content)
    load_recipe(file)


def _captioned(name: str) -> Callable[[bytes, Path], object]:
    def read(content: bytes, folder: Path) -> None:
        (folder / "a.png").write_bytes(_PNG)
        (folder / name).write_bytes(content)
        style = CaptionStyle(lines=name.endswith("txt"))
        for sample in read_samples(folder, style, is_decoded=lambda sha256: True):
            for text in sample.captions:
                text.encode()  # raises for half a surrogate pair, which no tokenizer takes

    return read


def _tar(content: bytes, folder: Path) -> None:
    (folder / "a.tar").write_bytes(content)
    for sample in read_samples(folder, CaptionStyle("x"), is_decoded=lambda sha256: True):
        sample_bytes(sample)


def _arrow(content: bytes, folder: Path) -> None:
    (folder / "a.arrow").write_bytes(content)
    (folder / "state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
    for sample in read_samples(folder, CaptionStyle("x"), is_decoded=lambda sha256: True):
        sample_bytes(sample)


def _packed(*files: tuple[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()[: 2048 + 512 * 2 * len(files)]


def _arrow_stream() -> bytes:
    table = pyarrow.table({"image": [_PNG, _PNG], "text": ["a dog", None]})
    stream = io.BytesIO()
    with pyarrow.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    return stream.getvalue()


def _adapter(content: bytes, folder: Path) -> None:
    file = folder / "lora.safetensors"
    file.write_bytes(content)
    read_layers(file, [])


_MATRICES = {
    "transformer.blocks.0.to_q.lora_A.weight": torch.ones(2, 4),
    "transformer.blocks.0.to_q.lora_B.weight": torch.ones(4, 2),
}


def _adapter_settings(content: bytes, folder: Path) -> None:
    with suppress(UnicodeDecodeError):
        _adapter(save(_MATRICES, metadata={METADATA: content.decode()}), folder)


def _weights(content: bytes, folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(content)
    try:
        with ShardedWeights(folder) as weights:
            for name in weights.names:
                weights.read(name)
    except ValueError as error:
        # `quant` has no errors of its own; its callers name the setting.
        if not str(error).startswith(str(folder)):
            raise
        raise HalfbyteError(ascii(str(error))) from error


def _state(content: bytes, folder: Path) -> None:
    step = folder / "step-000002"
    step.mkdir(exist_ok=True)
    (step / "state.json").write_bytes(content)
    read_state(step)


def _header(facts: object, data: bytes = b"") -> bytes:
    header = json.dumps(facts).encode()
    return struct.pack("<Q", len(header)) + header + data


_STATE = {
    "position": {"step": 2, "micro_batches": 4, "global_batch": 1},
    "optimizer_scalars": {"a.lora_A.weight": {"step": 2}},
    "param_groups": [{"lr": 0.001, "params": ["a.lora_A.weight"]}],
    "scaler": {},
}
_ROWS = [{"file_name": "a.png", "text": "a dog"}, {"file_name": "a.png", "caption": ["one", "two"]}]
_PEFT = {"r": 2, "lora_alpha": 4, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"^blocks": 8}}
_SETTINGS = {f"transformer.{key}": value for key, value in _PEFT.items()}

READERS = {
    "recipe": Reader(
        _recipe,
        (
            b"model: {family: flux, path: a/b}\ndata:\n  path: ./pictures\noutput: {dir: runs/a}\n",
            b"model:\n  family: sd3\n  path: a/b\n"
            b"data:\n  sets: [{path: ./pictures, repeats: 2},\n    {path: ./others}]\noutput: {dir: o}\n",
            b"a: &x 1\nb: *x\n? [c]\n: |\n  text\n--- !!python/object:os.system {}\n",
        ),
    ),
    "metadata_jsonl": Reader(
        _captioned("metadata.jsonl"),
        (*tuple(json.dumps(row).encode() for row in _ROWS), b"[" * 50, b"\xff\xfe{"),
    ),
    "metadata_csv": Reader(
        _captioned("metadata.csv"), (b'file_name,text\na.png,"a, dog"\n', b"text\n\n\x00")
    ),
    "caption_text": Reader(_captioned("a.txt"), (b"a dog\n\na cat\r\n", "﻿ä [trigger]".encode(), b"\xff")),
    "caption_json": Reader(
        _captioned("a.json"), (b'{"caption": "a dog"}', b'{"text": ["a", "b"]}', b'"\\ud800"')
    ),
    "meta_json": Reader(
        _captioned("meta.json"),
        (b'{"a": {"caption": "a dog", "tags": "b, c"}}', b'{"a.png": {}}', b'{"x": 1}'),
    ),
    "tar": Reader(
        _tar,
        (
            _packed(("a.png", _PNG), ("a.txt", b"a dog")),
            _packed(("b" * 120 + ".png", _PNG), ("../a.png", _PNG)),
        ),
    ),
    "arrow": Reader(_arrow, (_arrow_stream(),)),
    "adapter": Reader(
        _adapter,
        (
            save(_MATRICES, metadata={METADATA: json.dumps(_SETTINGS)}),
            save(
                {key.replace("transformer", "diffusion_model"): tensor for key, tensor in _MATRICES.items()}
            ),
            _header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        ),
    ),
    "adapter_settings": Reader(_adapter_settings, (json.dumps(_SETTINGS).encode(), b'{"lora_alpha": 1e999}')),
    "weights": Reader(
        _weights,
        (
            save({"a.weight": torch.ones(2, 2), "b": torch.ones(3, dtype=torch.bfloat16)}),
            _header({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, bytes(1)),
        ),
    ),
    "state": Reader(_state, (json.dumps(_STATE).encode(), b'{"position": {"step": NaN}}')),
}


def inputs(name: str) -> list[bytes]:
    """Returns the seeds of a reader and the inputs of its corpus."""
    return [*READERS[name].seeds, *(file.read_bytes() for file in sorted((CORPUS / name).glob("*")))]

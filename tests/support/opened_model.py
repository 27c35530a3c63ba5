"""Opens a model's folder and encodes with it as a run does, and edits copies of such folders."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from halfbyte.trainer.families.catalog import FAMILIES
from halfbyte.trainer.families.embedding import LatentMoments, TextEmbedding
from halfbyte.trainer.families.encoders import load_encoders

CPU = torch.device("cpu")
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 167666902\n"
VAE = "vae/diffusion_pytorch_model.safetensors"
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
CLIP = "text_encoder/model.safetensors"


def copy_of(model: Path, to: Path) -> Path:
    """Copies a model's folder with hard links, so that `replace` and `edit_*` must be used to change a file."""
    shutil.copytree(model, to, copy_function=lambda a, b: Path(b).hardlink_to(a))
    return to


def replace(file: Path, content: str | bytes) -> None:
    """Gives a file a new content, without changing the file that it is a hard link of."""
    file.unlink(missing_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Replaces a JSON file by its content after `change`, which edits the object in place."""
    content = json.loads(file.read_text())
    change(content)
    replace(file, json.dumps(content))


def edit_tensors(file: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Replaces a safetensors file by its content after `change`, which edits the tensors in place."""
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    file.unlink()
    save_file(tensors, file, {"format": "pt"})


def open_and_encode(family: str, folder: Path, memo: Path) -> tuple[TextEmbedding, LatentMoments]:
    """Opens the model, and encodes a caption and an image, with the functions that a run calls."""
    opened = FAMILIES[family].open(str(folder), None, 24)
    encoders = load_encoders(opened, device=CPU, dtype=torch.bfloat16, memo=memo)
    text = encoders.encode_texts(["a photo of a dog"])
    return text, encoders.encode_images(torch.linspace(-1, 1, 64).expand(1, 3, 64, 64))

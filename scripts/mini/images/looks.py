"""Every concept in every look: draws images on the accelerator, and prepares captions and latents once."""

import random
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from scripts.mini.images.captions import CAPTION_TOKENS, LOOKS, caption
from scripts.mini.images.corpus import Corpus
from scripts.mini.images.styles import BACKGROUNDS, STYLES, over

CLIP_TOKENS = 77

_FLAG_SHARE = 0.3  # relative to other concepts: a seventh of the corpus is flags
_PLAIN_SHARE, _BACKGROUND_SHARE = 0.3, 0.25  # shares of the images; the rest is in the other styles


def draw_all(sprites: Tensor) -> Tensor:
    """Returns (N * L, 3, 64, 64) uint8 on the same device, concept-major, for sprites (N, 4, 64, 64) uint8.

    Takes half a gigabyte for the corpus; drawing the images once avoids a search for each look in every
    training step.
    """
    pictures = torch.empty(
        (len(sprites), len(LOOKS), 3, *sprites.shape[2:]), dtype=torch.uint8, device=sprites.device
    )
    scaled = sprites.float() / 255
    for index, look in enumerate(LOOKS):
        if look.background is None:
            drawn = STYLES[look.style].draw(scaled)
        else:
            drawn = over(scaled, torch.tensor(BACKGROUNDS[look.background], device=sprites.device)[None])
        pictures[:, index] = drawn.mul(255).round().byte()
    return pictures.flatten(0, 1)


@dataclass(frozen=True)
class Captions:
    """Token ids of several captions of each image, and of the empty caption."""

    t5: Tensor  # (N * L, C, 32) int32
    clip: Tensor  # (N * L, C, 77) int32
    empty_t5: Tensor  # (32,)
    empty_clip: Tensor  # (77,)


@dataclass(frozen=True)
class Batch:
    """A random batch of images with captions."""

    mean: Tensor  # (B, 16, 16, 16) fp32: the VAE's posterior
    std: Tensor
    t5: Tensor  # (B, 32) int64
    clip: Tensor  # (B, 77) int64


class PictureTable:
    """Latents and captions of all N concepts in all L looks, on the accelerator; rows are concept-major."""

    def __init__(self, corpus: Corpus, vae: AutoencoderKL, captions: Captions, device: torch.device) -> None:
        self.device = device
        self.captions = captions
        self.mean, self.std = _encode(corpus, vae, device)
        concept = [_FLAG_SHARE if emoji.group == "country-flag" else 1.0 for emoji in corpus.emoji]
        backgrounds = len(BACKGROUNDS)
        styles = len(LOOKS) - backgrounds - 1
        look = [_PLAIN_SHARE] + [(1 - _PLAIN_SHARE - _BACKGROUND_SHARE) / styles] * styles
        look += [_BACKGROUND_SHARE / backgrounds] * backgrounds
        assert [look.background is None for look in LOOKS] == [True] * (styles + 1) + [False] * backgrounds
        self._shares = (torch.tensor(concept)[:, None] * torch.tensor(look)).flatten().to(device)

    @property
    def empty(self) -> tuple[Tensor, Tensor]:
        """Returns T5's (32,) and CLIP's (77,) tokens of the empty caption."""
        return self.captions.empty_t5, self.captions.empty_clip

    def draw(self, size: int, *, dropout: float) -> Batch:
        """Returns a random batch; `dropout` is the share of empty captions."""
        rows = torch.multinomial(self._shares, size, replacement=True)
        which = torch.randint(self.captions.t5.shape[1], (size,), device=self.device)
        empty = (torch.rand(size, device=self.device) < dropout)[:, None]
        t5 = torch.where(empty, self.captions.empty_t5, self.captions.t5[rows, which])
        clip = torch.where(empty, self.captions.empty_clip, self.captions.clip[rows, which])
        return Batch(self.mean[rows].float(), self.std[rows].float(), t5.long(), clip.long())


def read_captions(
    corpus: Corpus,
    clip: PreTrainedTokenizerBase,
    t5: PreTrainedTokenizerBase,
    *,
    each: int,
    seed: int,
    device: torch.device,
) -> Captions:
    """Samples `each` captions of every image and tokenizes them, padded like the pipeline's."""
    draws = random.Random(seed)
    texts = [caption(emoji, look, draws) for emoji in corpus.emoji for look in LOOKS for _ in range(each)]

    def read(tokenizer: PreTrainedTokenizerBase, lines: list[str], length: int) -> Tensor:
        ids = tokenizer(lines, padding="max_length", max_length=length, truncation=True).input_ids
        return torch.tensor(ids, dtype=torch.int32).to(device)

    shape = (len(corpus.emoji) * len(LOOKS), each, -1)
    return Captions(
        t5=read(t5, texts, CAPTION_TOKENS).reshape(shape),
        clip=read(clip, texts, CLIP_TOKENS).reshape(shape),
        empty_t5=read(t5, [""], CAPTION_TOKENS)[0],
        empty_clip=read(clip, [""], CLIP_TOKENS)[0],
    )


@torch.no_grad()
def _encode(corpus: Corpus, vae: AutoencoderKL, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns means and standard deviations of all images' latents, bf16, in the order of the captions."""
    found: list[tuple[Tensor, Tensor]] = []
    for pictures in draw_all(corpus.sprites.to(device)).split(512):
        posterior = vae.encode(as_input(pictures)).latent_dist
        found.append((posterior.mean.bfloat16(), posterior.std.bfloat16()))
    mean, std = zip(*found, strict=True)
    return torch.cat(mean), torch.cat(std)


def as_input(pictures: Tensor) -> Tensor:
    """Converts uint8 to fp32 in [-1, 1], the VAE's input."""
    return pictures.float() / 127.5 - 1

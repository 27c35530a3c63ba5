"""The styles in which emoji are drawn. Each is a function of only the sprite.

The true image of every caption is therefore known, also of captions that no model was trained on. Images are
(B, 3, 64, 64) fp32 in [0, 1]; sprites are (B, 4, 64, 64) fp32 in [0, 1] with opacity last.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

WHITE = (1.0, 1.0, 1.0)

# Words for the flat backgrounds that captions name; without such words the background is white.
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "black": (0.0, 0.0, 0.0),
    "grey": (0.55, 0.55, 0.55),
    "red": (0.85, 0.2, 0.2),
    "orange": (1.0, 0.6, 0.2),
    "yellow": (1.0, 0.9, 0.4),
    "green": (0.35, 0.7, 0.4),
    "teal": (0.2, 0.6, 0.6),
    "purple": (0.55, 0.35, 0.75),
    "pink": (1.0, 0.7, 0.8),
    "brown": (0.5, 0.35, 0.25),
    "light blue": (0.65, 0.85, 1.0),
}

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_SEPIA_DARK, _SEPIA_LIGHT = (0.24, 0.15, 0.08), (0.98, 0.92, 0.8)
_PAPER = (0.13, 0.32, 0.66)  # a cyanotype's blue
_RULES = (0.24, 0.44, 0.76)  # its grid
_RULE_SPACING = 8  # pixels


@dataclass(frozen=True)
class Style:
    """A way to draw, and the words for it around a name."""

    draw: Callable[[Tensor], Tensor]  # sprites (B, 4, 64, 64) -> images (B, 3, 64, 64)
    captions: tuple[str, ...]


def over(sprites: Tensor, background: Tensor) -> Tensor:
    """Composes sprites on flat colors; background (B, 3) or (1, 3)."""
    opacity = sprites[:, 3:]
    return sprites[:, :3] * opacity + background[:, :, None, None] * (1 - opacity)


def plain(sprites: Tensor) -> Tensor:
    return over(sprites, _color(WHITE, sprites)[:, :, 0, 0])


def greyscale(sprites: Tensor) -> Tensor:
    return _luma(plain(sprites)).expand(-1, 3, -1, -1)


def sepia(sprites: Tensor) -> Tensor:
    light = _luma(plain(sprites))
    return _color(_SEPIA_DARK, sprites) * (1 - light) + _color(_SEPIA_LIGHT, sprites) * light


def negative(sprites: Tensor) -> Tensor:
    return 1 - plain(sprites)


def silhouette(sprites: Tensor) -> Tensor:
    return (1 - sprites[:, 3:]).expand(-1, 3, -1, -1)


def pixel_art(sprites: Tensor) -> Tensor:
    """Draws squares of four pixels, each the mean of the area it covers."""
    return functional.interpolate(functional.avg_pool2d(plain(sprites), 4), scale_factor=4.0)


def small(sprites: Tensor) -> Tensor:
    """Draws at half the size, in the middle; colors are weighted by opacity."""
    weighted = torch.cat((sprites[:, :3] * sprites[:, 3:], sprites[:, 3:]), dim=1)
    quarter = sprites.shape[-1] // 4
    half = functional.pad(functional.avg_pool2d(weighted, 2), (quarter,) * 4)
    return half[:, :3] + 1 - half[:, 3:]


def upside_down(sprites: Tensor) -> Tensor:
    return plain(sprites).flip(-2)


def pencil(sprites: Tensor) -> Tensor:
    """Draws dark gray lines on white."""
    return (1 - 0.8 * _edges(sprites)).expand(-1, 3, -1, -1)


def blueprint(sprites: Tensor) -> Tensor:
    """Draws white lines on ruled blue paper: the held-out style."""
    side = sprites.shape[-1]
    ruled = torch.zeros(side, side, device=sprites.device)
    ruled[::_RULE_SPACING, :] = 1
    ruled[:, ::_RULE_SPACING] = 1
    paper = torch.lerp(_color(_PAPER, sprites), _color(_RULES, sprites), ruled)
    return torch.lerp(paper, torch.ones_like(paper), _edges(sprites))


# {a} stands for the name with its article, {name} for the bare name.
STYLES: dict[str, Style] = {
    "plain": Style(
        plain,
        (
            "{name}",
            "{a}",
            "{name} emoji",
            "a picture of {a}",
            "an emoji of {a}",
            "an icon of {name}",
            "a drawing of {a}",
        ),
    ),
    "greyscale": Style(
        greyscale, ("a greyscale picture of {a}", "{a} in black and white", "a grey picture of {name}")
    ),
    "sepia": Style(sepia, ("a sepia picture of {a}", "an old photograph of {a}", "{name} in sepia")),
    "negative": Style(
        negative, ("a negative of {a}", "{a} in inverted colours", "an inverted picture of {name}")
    ),
    "silhouette": Style(silhouette, ("a silhouette of {a}", "{name} as a black shadow", "the shadow of {a}")),
    "pixel art": Style(pixel_art, ("pixel art of {a}", "{name} as pixel art", "a mosaic of {a}")),
    "small": Style(small, ("a small {name}", "a tiny {name}", "{a} far away")),
    "upside down": Style(
        upside_down, ("{a} upside down", "an upside down picture of {a}", "{name} turned over")
    ),
    "pencil": Style(pencil, ("a pencil drawing of {a}", "a line drawing of {a}", "{name} in pencil")),
}

HELD_OUT_STYLE = Style(blueprint, ("a blueprint of {a}",))


def _color(color: tuple[float, float, float], like: Tensor) -> Tensor:
    return torch.tensor(color, device=like.device, dtype=like.dtype)[None, :, None, None]


def _luma(pictures: Tensor) -> Tensor:
    """Returns (B, 1, H, W) of (B, 3, H, W)."""
    return (pictures * _color(_LUMA, pictures)).sum(dim=1, keepdim=True)


def _edges(sprites: Tensor) -> Tensor:
    """Returns (B, 1, 64, 64) in [0, 1]: lines, about two pixels wide, where brightness, color or opacity changes."""
    channels = torch.cat((over(sprites, _color((0.5, 0.5, 0.5), sprites)[:, :, 0, 0]), sprites[:, 3:]), dim=1)
    smooth = functional.avg_pool2d(functional.pad(channels, (1,) * 4, mode="replicate"), 3, stride=1)
    around = functional.pad(smooth, (1,) * 4, mode="replicate")
    across = around[..., 1:-1, 2:] - around[..., 1:-1, :-2]
    down = around[..., 2:, 1:-1] - around[..., :-2, 1:-1]
    strength = (across.square() + down.square()).sqrt().amax(dim=1, keepdim=True)
    return ((strength - 0.1) / 0.3).clamp(0, 1)

"""Maps the tensor names of older files to those that the installed diffusers and transformers use."""

import re
from collections.abc import Collection, Iterable, Iterator

# Older versions of transformers have all of CLIP's text model below this prefix; newer ones only with a
# projection.
_CLIP = "text_model."
# diffusers renamed the layers of the VAE's attention.
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION = re.compile(r"(.*\.attentions\.\d+\.)(query|key|value|proj_attn)(\.(?:weight|bias))")
# Tensors of whole CLIP models, and buffers that older versions saved.
_HARMLESS = re.compile(
    r"(.*\.)?embeddings\.position_ids|vision_model\..*|(visual|text)_projection\.weight|logit_scale"
)


def own_names(names: Iterable[str], expected: Collection[str]) -> dict[str, str]:
    """Returns the model's name for each of `names` that the model, with tensors `expected`, has renamed."""
    return {
        name: own
        for name in names
        if name not in expected and (own := next(_candidates(name, expected), None)) is not None
    }


def is_harmless(name: str) -> bool:
    """Tests whether a text encoder's file may have this tensor although its model has none."""
    return _HARMLESS.fullmatch(name) is not None


def _candidates(name: str, expected: Collection[str]) -> Iterator[str]:
    renamed = [name.removeprefix(_CLIP), _CLIP + name]
    old = _OLD_ATTENTION.fullmatch(name)
    if old is not None:
        renamed.append(old[1] + _ATTENTION[old[2]] + old[3])
    yield from (own for own in renamed if own in expected)

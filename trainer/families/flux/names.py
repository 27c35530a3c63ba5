"""Maps FLUX's layer names in its authors' checkpoints to diffusers' names.

Source: diffusers' conversion of these checkpoints, `convert_flux_transformer_checkpoint_to_diffusers`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from halfbyte.trainer.pretrained.layer_names import OriginalName, qkv

_MLP_RATIO = 4  # MLP width of the single blocks over the model's width; no config contains it

_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_GUIDANCE = {
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
}
# Per stream: the prefix of the original names, and the layers of diffusers' block (modulation; queries, keys,
# values; attention's output; MLP; RMSNorms).
_STREAMS = {
    "img": ("norm1.linear", ("to_q", "to_k", "to_v"), "attn.to_out.0", "ff", ("norm_q", "norm_k")),
    "txt": (
        "norm1_context.linear",
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        "attn.to_add_out",
        "ff_context",
        ("norm_added_q", "norm_added_k"),
    ),
}


def flux_names(config: Mapping[str, Any]) -> Iterator[OriginalName]:
    """Yields every layer of the transformer that `config` describes, norms included."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    for original, ours in (_OUTSIDE | (_GUIDANCE if config["guidance_embeds"] else {})).items():
        yield OriginalName(original, (ours,))
    yield OriginalName("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True)
    for number in range(config["num_layers"]):
        yield from _dual(f"double_blocks.{number}", f"transformer_blocks.{number}", width)
    for number in range(config["num_single_layers"]):
        yield from _single(f"single_blocks.{number}", f"single_transformer_blocks.{number}", width)


def _dual(original: str, block: str, width: int) -> Iterator[OriginalName]:
    for stream, (modulation, kinds, output, mlp, norms) in _STREAMS.items():
        yield OriginalName(f"{original}.{stream}_mod.lin", (f"{block}.{modulation}",))
        yield qkv(f"{original}.{stream}_attn.qkv", f"{block}.attn", kinds, width)
        yield OriginalName(f"{original}.{stream}_attn.proj", (f"{block}.{output}",))
        yield OriginalName(f"{original}.{stream}_mlp.0", (f"{block}.{mlp}.net.0.proj",))
        yield OriginalName(f"{original}.{stream}_mlp.2", (f"{block}.{mlp}.net.2",))
        yield from _norms(f"{original}.{stream}_attn.norm", f"{block}.attn", norms)


def _single(original: str, block: str, width: int) -> Iterator[OriginalName]:
    yield OriginalName(f"{original}.modulation.lin", (f"{block}.norm.linear",))
    yield OriginalName(
        f"{original}.linear1",
        (*(f"{block}.attn.{kind}" for kind in ("to_q", "to_k", "to_v")), f"{block}.proj_mlp"),
        (width, width, width, _MLP_RATIO * width),
    )
    yield OriginalName(f"{original}.linear2", (f"{block}.proj_out",))
    yield from _norms(f"{original}.norm", f"{block}.attn", ("norm_q", "norm_k"))


def _norms(original: str, attention: str, norms: tuple[str, str]) -> Iterator[OriginalName]:
    for kind, norm in zip(("query_norm", "key_norm"), norms, strict=True):
        yield OriginalName(f"{original}.{kind}", (f"{attention}.{norm}",), leaf="scale")

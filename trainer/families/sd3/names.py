"""Maps SD3's layer names in its authors' checkpoints to diffusers' names.

Source: diffusers' conversion of these checkpoints, `convert_sd3_transformer_checkpoint_to_diffusers`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from halfbyte.trainer.pretrained.layer_names import OriginalName, qkv

_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}


def sd3_names(config: Mapping[str, Any]) -> Iterator[OriginalName]:
    """Yields every linear layer of the transformer that `config` describes."""
    for original, ours in _OUTSIDE.items():
        yield OriginalName(original, (ours,))
    yield OriginalName("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True)
    last = config["num_layers"] - 1
    for number in range(config["num_layers"]):
        dual = number in (config.get("dual_attention_layers") or ())
        yield from _block(number, config, dual=dual, last=number == last)


def _block(number: int, config: Mapping[str, Any], *, dual: bool, last: bool) -> Iterator[OriginalName]:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    block, own = f"transformer_blocks.{number}", f"joint_blocks.{number}"
    image, text = f"{own}.x_block", f"{own}.context_block"
    yield OriginalName(f"{image}.adaLN_modulation.1", (f"{block}.norm1.linear",))
    yield qkv(f"{image}.attn.qkv", f"{block}.attn", ("to_q", "to_k", "to_v"), width)
    yield OriginalName(f"{image}.attn.proj", (f"{block}.attn.to_out.0",))
    if dual:
        yield qkv(f"{image}.attn2.qkv", f"{block}.attn2", ("to_q", "to_k", "to_v"), width)
        yield OriginalName(f"{image}.attn2.proj", (f"{block}.attn2.to_out.0",))
    yield OriginalName(f"{image}.mlp.fc1", (f"{block}.ff.net.0.proj",))
    yield OriginalName(f"{image}.mlp.fc2", (f"{block}.ff.net.2",))
    # The last block does not change the text stream; the text's modulation has only a shift and a scale
    # there.
    yield OriginalName(f"{text}.adaLN_modulation.1", (f"{block}.norm1_context.linear",), swapped=last)
    yield qkv(f"{text}.attn.qkv", f"{block}.attn", ("add_q_proj", "add_k_proj", "add_v_proj"), width)
    if not last:
        yield OriginalName(f"{text}.attn.proj", (f"{block}.attn.to_add_out",))
        yield OriginalName(f"{text}.mlp.fc1", (f"{block}.ff_context.net.0.proj",))
        yield OriginalName(f"{text}.mlp.fc2", (f"{block}.ff_context.net.2",))

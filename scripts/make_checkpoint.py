"""Write a pipeline of FLUX.1-dev's shapes with random weights, to try a start at full size without the Hub.

    python scripts/make_checkpoint.py FOLDER [--size full|toy] [--parts transformer,t5,clip,vae]

bf16 safetensors in shards, as the Hub holds them: 24 GB of transformer in three files, 9.5 GB of T5-XXL in two, CLIP
and VAE. Tokenizers are the miniatures'. Weights are drawn on the GPU where there is one, in seconds; most of the
time goes to the disk. `--size toy` has the same files with a few million parameters.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from halfbyte.quant.shards import TEXT_WEIGHTS_FILE, WEIGHTS_FILE, write_weights
from halfbyte.trainer.mini_tokenizers import clip_tokenizer, t5_tokenizer

PARTS = ("transformer", "t5", "clip", "vae")


@dataclass(frozen=True)
class Sizes:
    """What differs between the model and its toy."""

    dual: int
    single: int
    heads: int
    rope: tuple[int, int, int]  # features of a head that each axis turns
    t5_layers: int
    t5_heads: int
    t5_feed_forward: int
    text_width: int  # of T5's states
    clip_layers: int
    clip_width: int
    vae_channels: tuple[int, int, int, int]
    shard_bytes: int


SIZES = {
    "full": Sizes(
        19, 38, 24, (16, 56, 56), 24, 64, 10240, 4096, 12, 768, (128, 256, 512, 512), 9_990_000_000
    ),
    "toy": Sizes(2, 3, 4, (8, 12, 12), 2, 4, 256, 128, 2, 64, (16, 16, 32, 32), 1_000_000),
}


def make_checkpoint(folder: Path, sizes: Sizes, device: torch.device, parts: tuple[str, ...] = PARTS) -> None:
    """Writes the pipeline, or some of its `parts`; prints how long each took."""
    pipeline = empty_pipeline(sizes)
    for part in parts:
        began = time.perf_counter()
        if part == "transformer":
            _write(pipeline.transformer, folder / "transformer", WEIGHTS_FILE, sizes.shard_bytes, device, ())
        elif part == "t5":
            # As T5 is saved everywhere: its embedding once.
            tied = ("encoder.embed_tokens.weight",)
            _write(
                pipeline.text_encoder_2,
                folder / "text_encoder_2",
                TEXT_WEIGHTS_FILE,
                sizes.shard_bytes // 2,
                device,
                tied,
            )
        elif part == "clip":
            _write(
                pipeline.text_encoder,
                folder / "text_encoder",
                TEXT_WEIGHTS_FILE,
                sizes.shard_bytes,
                device,
                (),
            )
        else:
            _write(pipeline.vae, folder / "vae", WEIGHTS_FILE, sizes.shard_bytes, device, ())
        size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        print(f"{part}: {time.perf_counter() - began:.1f} s, {size / 1e9:.1f} GB in all so far", flush=True)
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    pipeline.tokenizer_2.save_pretrained(folder / "tokenizer_2")
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    pipeline.save_config(folder)


def empty_pipeline(sizes: Sizes) -> FluxPipeline:
    """The pipeline with its parameters on meta."""
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    with init_empty_weights():
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=sizes.dual,
            num_single_layers=sizes.single,
            attention_head_dim=sum(sizes.rope),
            num_attention_heads=sizes.heads,
            joint_attention_dim=sizes.text_width,
            pooled_projection_dim=sizes.clip_width,
            guidance_embeds=True,
            axes_dims_rope=sizes.rope,
        )
        text_encoder_2 = T5EncoderModel(
            T5Config(
                vocab_size=32128,
                d_model=sizes.text_width,
                d_kv=64,
                d_ff=sizes.t5_feed_forward,
                num_layers=sizes.t5_layers,
                num_heads=sizes.t5_heads,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
            )
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=sizes.clip_width,
                intermediate_size=4 * sizes.clip_width,
                projection_dim=sizes.clip_width,
                num_hidden_layers=sizes.clip_layers,
                num_attention_heads=sizes.clip_width // 64,
                max_position_embeddings=77,
                bos_token_id=clip.bos_token_id,
                eos_token_id=clip.eos_token_id,
                pad_token_id=clip.pad_token_id,
            )
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=sizes.vae_channels,
            layers_per_block=2,
            latent_channels=16,
            norm_num_groups=min(32, sizes.vae_channels[0] // 2),
            sample_size=1024,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
            force_upcast=True,
        )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    return FluxPipeline(scheduler, vae, text_encoder, clip, text_encoder_2, t5, transformer)


def _write(
    model: nn.Module,
    folder: Path,
    weights_file: str,
    shard_bytes: int,
    device: torch.device,
    left_out: tuple[str, ...],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    draws = torch.Generator(device).manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in left_out}
    groups = ({name: _drawn(name, shape, draws)} for name, shape in shapes.items())
    write_weights(groups, folder, max_shard_bytes=shard_bytes, weights_file=weights_file)
    if isinstance(model, FluxTransformer2DModel | AutoencoderKL):
        model.save_config(folder)
    else:
        model.config.save_pretrained(folder)


def _drawn(name: str, shape: torch.Size, draws: torch.Generator) -> Tensor:
    """Weights that keep the size of what flows through; norms are one and biases zero."""
    tensor = torch.empty(shape, dtype=torch.bfloat16, device=draws.device)
    if len(shape) <= 1:
        return tensor.fill_(1.0 if name.endswith("weight") else 0.0)
    if name.endswith(("shared.weight", "relative_attention_bias.weight")):
        return tensor.normal_(generator=draws)
    fan_in = shape[1:].numel()
    # T5 does not scale its attention: that is in its queries' weights.
    scale = 1 / 8 if name.endswith("SelfAttention.q.weight") else 1.0
    return tensor.normal_(std=scale * fan_in**-0.5, generator=draws)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--parts", default=",".join(PARTS), help="which of transformer, t5, clip and vae")
    arguments = parser.parse_args()
    parts = tuple(arguments.parts.split(","))
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: got {', '.join(sorted(unknown))}, accepted: {', '.join(PARTS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    make_checkpoint(arguments.folder, SIZES[arguments.size], device, parts)


if __name__ == "__main__":
    main()

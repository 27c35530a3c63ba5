"""Make the miniature FLUX that comes with the repository, from nothing but three Debian packages.

.venv/bin/python scripts/pretrain_mini.py corpus  --corpus FOLDER
.venv/bin/python scripts/pretrain_mini.py vae      --corpus FOLDER --out FOLDER --minutes 3
.venv/bin/python scripts/pretrain_mini.py denoiser --corpus FOLDER --out FOLDER --minutes 6
.venv/bin/python scripts/pretrain_mini.py guidance --corpus FOLDER --out FOLDER --minutes 2
.venv/bin/python scripts/pretrain_mini.py samples  --corpus FOLDER --out FOLDER
.venv/bin/python scripts/pretrain_mini.py pictures --corpus FOLDER --out recipes/blueprints

The stages are for one GPU; they run on a CPU too, for a few --steps.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from pretrain_blueprints import write_blueprints
from pretrain_captions import CAPTION_TOKENS
from pretrain_corpus import HELD_OUT_GROUP, Corpus, draw_corpus, fetch_packages
from pretrain_denoiser import KINDS, distill_guidance, train_denoiser
from pretrain_looks import PictureTable, read_captions
from pretrain_pace import Pace
from pretrain_pipeline import bf16_copy, build_vae
from pretrain_samples import draw_sheet
from pretrain_vae import train_vae
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--corpus", type=Path, required=True, help="emoji.jsonl and sprites.webp")
    parser.add_argument("--out", type=Path, help="the pipeline's folder")
    parser.add_argument("--packages", type=Path, help="unpacked Debian packages; left out: downloaded")
    parser.add_argument("--family", choices=KINDS, default="flux")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--captions", type=int, default=6, help="of each picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the transformer's blocks")
    arguments = parser.parse_args()
    if arguments.stage != "corpus" and arguments.out is None:
        parser.error("--out: the folder of the pipeline is missing")
    torch.manual_seed(arguments.seed)
    STAGES[arguments.stage](arguments)


def make_corpus(arguments: argparse.Namespace) -> None:
    packages = arguments.packages or arguments.corpus / "packages"
    if arguments.packages is None:
        fetch_packages(packages)
    corpus = draw_corpus(packages)
    corpus.save(arguments.corpus)
    print(f"{len(corpus.emoji)} emoji in {arguments.corpus}")


def make_vae(arguments: argparse.Namespace) -> None:
    device = _device()
    vae = build_vae()
    corpus = Corpus.load(arguments.corpus).without(HELD_OUT_GROUP)
    pace = Pace("VAE", minutes=arguments.minutes, steps=arguments.steps)
    decibels = train_vae(vae, corpus, batch=arguments.batch, pace=pace, device=device)
    nn.Module.to(vae, torch.bfloat16).save_pretrained(arguments.out / "vae")
    _note(arguments, pace, psnr=round(decibels, 2))


def make_denoiser(arguments: argparse.Namespace) -> None:
    corpus = Corpus.load(arguments.corpus).without(HELD_OUT_GROUP)
    pipeline = KINDS[arguments.family].build(corpus.emoji, _load_vae(arguments))
    _train(arguments, pipeline, corpus, train_denoiser)


def make_guidance(arguments: argparse.Namespace) -> None:
    corpus = Corpus.load(arguments.corpus).without(HELD_OUT_GROUP)
    # In fp32 again, but for the VAE what was saved last is bf16: the difference is far below a training step.
    parts = {"vae": _load_vae(arguments), "torch_dtype": torch.float32}
    if not KINDS[arguments.family].told_guidance:
        raise SystemExit(
            f"guidance: {arguments.family} has no guidance embedding; it samples with two evaluations"
        )
    _train(
        arguments,
        KINDS[arguments.family].pipeline.from_pretrained(arguments.out, **parts),
        corpus,
        distill_guidance,
    )


def _load_vae(arguments: argparse.Namespace) -> AutoencoderKL:
    """In fp32, for latents as exact as the saved weights allow."""
    return AutoencoderKL.from_pretrained(arguments.out / "vae", torch_dtype=torch.float32).to(_device())


def _train(
    arguments: argparse.Namespace, pipeline: DiffusionPipeline, corpus: Corpus, train: Callable[..., float]
) -> None:
    """Prepares pictures and captions, trains, saves, and notes what was done in `pretraining.json`."""
    stage = arguments.stage
    kind = KINDS[arguments.family]
    t5 = getattr(pipeline, kind.t5_tokenizer)
    began = time.perf_counter()
    captions = read_captions(
        corpus,
        pipeline.tokenizer,
        t5,
        each=arguments.captions,
        seed=arguments.seed,
        device=_device(),
    )
    full = (captions.t5[..., -1] != t5.pad_token_id).float().mean().item()
    table = PictureTable(corpus, pipeline.vae, captions, _device())
    print(
        f"{len(table.mean)} pictures with {arguments.captions} captions each, read in"
        f" {time.perf_counter() - began:.0f} s; {full:.1%} of the captions fill all {CAPTION_TOKENS} tokens",
        flush=True,
    )
    pace = Pace(stage, minutes=arguments.minutes, steps=arguments.steps)
    loss = train(
        kind,
        pipeline,
        table,
        batch=arguments.batch,
        pace=pace,
        compiled=arguments.compile,
        save=lambda: bf16_copy(pipeline).save_pretrained(arguments.out),
    )
    _note(arguments, pace, loss=round(loss, 4))


def _note(arguments: argparse.Namespace, pace: Pace, **measured: float) -> None:
    file = arguments.out / "pretraining.json"
    notes = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    notes[arguments.stage] = {
        "steps": pace.total,
        "batch": arguments.batch,
        "seconds": round(pace.seconds),
    } | measured
    file.write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")


def make_samples(arguments: argparse.Namespace) -> None:
    pipeline = KINDS[arguments.family].pipeline.from_pretrained(arguments.out, torch_dtype=torch.bfloat16)
    corpus = Corpus.load(arguments.corpus)
    picture, distances = draw_sheet(pipeline, corpus, seed=arguments.seed)
    picture.save(arguments.out / "samples.png", optimize=True)
    for style, distance in distances.items():
        print(f"{style}: mean distance {distance:.4f}")


def make_pictures(arguments: argparse.Namespace) -> None:
    write_blueprints(Corpus.load(arguments.corpus), arguments.out)


STAGES = {
    "corpus": make_corpus,
    "vae": make_vae,
    "denoiser": make_denoiser,
    "guidance": make_guidance,
    "samples": make_samples,
    "pictures": make_pictures,
}


def _device() -> torch.device:
    # cuDNN's attention gives wrong gradients on FLUX's blocks, or faults (torch 2.11, cuDNN 9.19).
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.benchmark = True  # every step has the same shapes
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()

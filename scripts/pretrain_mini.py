"""Make the miniature FLUX that comes with the repository, from nothing but three Debian packages.

.venv/bin/python scripts/pretrain_mini.py corpus  --corpus FOLDER
.venv/bin/python scripts/pretrain_mini.py vae      --corpus FOLDER --out FOLDER --minutes 3
.venv/bin/python scripts/pretrain_mini.py denoiser --corpus FOLDER --out FOLDER --minutes 6
.venv/bin/python scripts/pretrain_mini.py samples  --corpus FOLDER --out FOLDER
.venv/bin/python scripts/pretrain_mini.py pictures --corpus FOLDER --out recipes/blueprints

The stages are for one GPU; they run on a CPU too, for a few --steps.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline
from pretrain_blueprints import write_blueprints
from pretrain_captions import CAPTION_TOKENS
from pretrain_corpus import HELD_OUT_GROUP, Corpus, draw_corpus, fetch_packages
from pretrain_denoiser import train_denoiser
from pretrain_looks import PictureTable, read_captions
from pretrain_pace import Pace
from pretrain_pipeline import bf16_copy, build_flux, build_vae
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
    train_vae(vae, corpus, batch=arguments.batch, pace=pace, device=device)
    nn.Module.to(vae, torch.bfloat16).save_pretrained(arguments.out / "vae")


def make_denoiser(arguments: argparse.Namespace) -> None:
    device = _device()
    corpus = Corpus.load(arguments.corpus).without(HELD_OUT_GROUP)
    # In fp32, for latents as exact as the saved weights allow.
    vae = AutoencoderKL.from_pretrained(arguments.out / "vae", torch_dtype=torch.float32).to(device)
    pipeline = build_flux(corpus.emoji, vae)
    began = time.perf_counter()
    captions = read_captions(
        corpus,
        pipeline.tokenizer,
        pipeline.tokenizer_2,
        each=arguments.captions,
        seed=arguments.seed,
        device=device,
    )
    padded = (captions.t5[..., -1] != pipeline.tokenizer_2.pad_token_id).float().mean().item()
    table = PictureTable(corpus, vae, captions, device)
    print(
        f"{len(table.mean)} pictures with {arguments.captions} captions each, read in"
        f" {time.perf_counter() - began:.0f} s; {padded:.1%} of the captions fill all {CAPTION_TOKENS} tokens",
        flush=True,
    )
    pace = Pace("denoiser", minutes=arguments.minutes, steps=arguments.steps)
    loss = train_denoiser(
        pipeline,
        table,
        batch=arguments.batch,
        pace=pace,
        compiled=arguments.compile,
        save=lambda: bf16_copy(pipeline).save_pretrained(arguments.out),
    )
    facts = {
        "steps": pace.total,
        "seconds": round(pace.seconds),
        "batch": arguments.batch,
        "loss": round(loss, 4),
    }
    (arguments.out / "pretraining.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
    print(json.dumps(facts), flush=True)


def make_samples(arguments: argparse.Namespace) -> None:
    pipeline = FluxPipeline.from_pretrained(arguments.out, torch_dtype=torch.bfloat16).to(_device())
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
    "samples": make_samples,
    "pictures": make_pictures,
}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()

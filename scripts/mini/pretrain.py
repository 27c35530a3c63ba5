"""Makes the mini pipelines that come with the repository, from three Debian packages.

    P="python -m scripts.mini.pretrain --corpus CORPUS --out OUT"
    $P corpus
    $P vae denoiser guidance --minutes 3 6 1 --batch 64 512 512 --compile
    $P samples
    python -m scripts.mini.pretrain pictures --corpus CORPUS --out recipes/blueprints

vae, denoiser and guidance train and need one GPU; a CPU can run them for a few --steps. Each ends after its
minutes, or after as many steps as those minutes once allowed. `denoiser --continue` continues from the
weights in OUT.

SD3 uses FLUX's VAE and has no guidance to distill; both commands need its name:

    mkdir -p OUT && cp -r recipes/mini/flux/vae OUT/
    $P denoiser samples --family sd3 --minutes 7.2 --batch 256 --compile
"""

import argparse
import json
import time
from functools import cached_property
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import nn

from scripts.mini.denoiser import KINDS, Stage, distill_guidance, train_denoiser
from scripts.mini.images.blueprints import write_blueprints
from scripts.mini.images.captions import CAPTION_TOKENS
from scripts.mini.images.corpus import HELD_OUT_GROUP, Corpus, draw_corpus, fetch_packages
from scripts.mini.images.looks import PictureTable, read_captions
from scripts.mini.images.samples import draw_sheet
from scripts.mini.pace import Pace
from scripts.mini.shared_parts import bf16_copy, build_vae
from scripts.mini.vae import train_vae

TRAINED = ("vae", "denoiser", "guidance")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="+", choices=STAGES)
    parser.add_argument("--corpus", type=Path, required=True, help="folder of emoji.jsonl and sprites.webp")
    parser.add_argument("--out", type=Path, help="the pipeline's folder")
    parser.add_argument("--packages", type=Path, help="unpacked Debian packages; default: download them")
    parser.add_argument("--family", choices=KINDS, default="flux")
    parser.add_argument("--minutes", type=float, nargs="+", default=[], help="one value per trained stage")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[], help="one value per trained stage, instead of minutes"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[], help="one value per trained stage")
    parser.add_argument("--captions", type=int, default=5, help="captions per image")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the transformer's blocks")
    parser.add_argument(
        "--continue", action="store_true", dest="go_on", help="train the denoiser from OUT's weights"
    )
    arguments = parser.parse_args()
    if arguments.stages != ["corpus"] and arguments.out is None:
        parser.error("--out: the folder of the pipeline is missing")
    trained = [stage for stage in arguments.stages if stage in TRAINED]
    given = arguments.minutes or arguments.steps
    if (arguments.minutes and arguments.steps) or not len(given) == len(arguments.batch) == len(trained):
        parser.error(f"--minutes or --steps, and --batch: expected one for each of {trained or 'no stage'}")
    torch.manual_seed(arguments.seed)
    workshop = Workshop(arguments)
    for stage in arguments.stages:
        STAGES[stage](workshop)


class Workshop:
    """The results that the stages of one call share: images are drawn and encoded, and captions read, only once."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.kind = KINDS[arguments.family]
        self.out: Path = arguments.out
        # cuDNN's attention gives wrong gradients on FLUX's blocks, or faults (torch 2.11, cuDNN 9.19).
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def corpus(self) -> Corpus:
        """The corpus without the held-out concepts."""
        return Corpus.load(self.arguments.corpus).without(HELD_OUT_GROUP)

    @cached_property
    def vae(self) -> AutoencoderKL:
        """The VAE in fp32, so that latents are as exact as the saved weights allow."""
        loaded = AutoencoderKL.from_pretrained(self.out / "vae", torch_dtype=torch.float32)
        return loaded.to(self.device).requires_grad_(False)

    @cached_property
    def pipeline(self) -> DiffusionPipeline:
        """The pipeline in OUT, in fp32; rounding the saved weights to bf16 changes far less than a training step."""
        return self.kind.pipeline.from_pretrained(self.out, vae=self.vae, torch_dtype=torch.float32)

    @cached_property
    def table(self) -> PictureTable:
        began = time.perf_counter()
        each = self.arguments.captions
        t5 = getattr(self.pipeline, self.kind.t5_tokenizer)
        captions = read_captions(
            self.corpus,
            self.pipeline.tokenizer,
            t5,
            each=each,
            seed=self.arguments.seed,
            device=self.device,
        )
        full = (captions.t5[..., -1] != t5.pad_token_id).float().mean().item()
        table = PictureTable(self.corpus, self.vae, captions, self.device)
        print(
            f"{len(table.mean)} images with {each} captions each, read in {time.perf_counter() - began:.0f} s;"
            f" {full:.1%} of the captions fill all {CAPTION_TOKENS} tokens",
            flush=True,
        )
        return table

    def pace(self, name: str) -> Pace:
        """Returns the next trained stage's clock."""
        minutes, steps = self.arguments.minutes, self.arguments.steps
        return Pace(name, minutes=minutes.pop(0) if minutes else None, steps=steps.pop(0) if steps else None)

    def stage(self, name: str) -> Stage:
        """Returns the inputs of a stage of the denoiser."""
        table = self.table  # not on the clock
        return Stage(
            self.kind,
            table,
            batch=self.arguments.batch.pop(0),
            pace=self.pace(name),
            compiled=self.arguments.compile,
            save=lambda: bf16_copy(self.pipeline).save_pretrained(self.out),
        )

    def note(self, pace: Pace, batch: int, **measured: float) -> None:
        """Adds a stage's results to `pretraining.json`."""
        file = self.out / "pretraining.json"
        notes = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        did = {"stage": pace.title, "steps": pace.total, "batch": batch, "seconds": round(pace.seconds)}
        print(json.dumps(did | measured), flush=True)
        file.write_text(json.dumps([*notes, did | measured], indent=2) + "\n", encoding="utf-8")


def make_corpus(workshop: Workshop) -> None:
    arguments = workshop.arguments
    packages = arguments.packages or arguments.corpus / "packages"
    if arguments.packages is None:
        fetch_packages(packages)
    corpus = draw_corpus(packages)
    corpus.save(arguments.corpus)
    print(f"{len(corpus.emoji)} emoji in {arguments.corpus}")


def make_vae(workshop: Workshop) -> None:
    vae = build_vae()
    batch, pace = workshop.arguments.batch.pop(0), workshop.pace("vae")
    decibels = train_vae(vae, workshop.corpus, batch=batch, pace=pace, device=workshop.device)
    nn.Module.to(vae, torch.bfloat16).save_pretrained(workshop.out / "vae")
    workshop.note(pace, batch, psnr=round(decibels, 2))


def make_denoiser(workshop: Workshop) -> None:
    if not workshop.arguments.go_on:
        workshop.pipeline = workshop.kind.build(workshop.corpus.emoji, workshop.vae)
    stage = workshop.stage("denoiser")
    loss = train_denoiser(workshop.pipeline, stage)
    workshop.note(stage.pace, stage.batch, loss=round(loss, 4))


def make_guidance(workshop: Workshop) -> None:
    if not workshop.kind.told_guidance:
        raise SystemExit("guidance: this family has no guidance embedding; it samples with two evaluations")
    stage = workshop.stage("guidance")
    loss = distill_guidance(workshop.pipeline, stage)
    workshop.note(stage.pace, stage.batch, loss=round(loss, 4))


def make_samples(workshop: Workshop) -> None:
    pipeline = workshop.kind.pipeline.from_pretrained(workshop.out, torch_dtype=torch.bfloat16)
    picture, distances = draw_sheet(
        pipeline.to(workshop.device), workshop.corpus, seed=workshop.arguments.seed
    )
    picture.save(workshop.out / "samples.jpg", quality=88)
    for style, distance in distances.items():
        print(f"{style}: mean distance {distance:.4f}")


def make_pictures(workshop: Workshop) -> None:
    write_blueprints(Corpus.load(workshop.arguments.corpus), workshop.out)


STAGES = {
    "corpus": make_corpus,
    "vae": make_vae,
    "denoiser": make_denoiser,
    "guidance": make_guidance,
    "samples": make_samples,
    "pictures": make_pictures,
}


if __name__ == "__main__":
    main()

"""Seconds and memory of one training step at full size, ours beside what a user would pick instead.

    python scripts/bench_train.py --rows ours,bf16 --px 1024,512 --checkpoint none,selective,full,offload
    python scripts/bench_train.py --rows ours --checkpoint full,offload --stream --optimizer adamw_8bit --budget 6
    python scripts/bench_train.py --rows ours,bf16 --px 1024,512 --checkpoint none,selective,full --graphs
    python scripts/bench_train.py --rows peer --px 1024 --compile --json step.json

Random weights of the real shapes, batch 1, LoRA on every linear of the blocks, AdamW unless `--optimizer` says
another. `ours` is the NF4 base with double quantization in our layers, `bf16` the same adapters over an unquantized
base, `peer` diffusers with bitsandbytes' layers and stock PEFT. Each step is forward, backward and optimizer; medians
after warm-up. The mini model (`--model flux_mini`) runs on the CPU as well.

`--graphs` records a step of each size and launches it as a whole. Its memory counts as allocated only while it is
recorded, so the peak of such rows is what the allocator has reserved. `--stream` leaves the packed blocks on the host,
and rows then say how fast they came. `--budget` holds the allocator to what a card of so many GB has besides a context.
Where halfbyte is not installed, put a folder on PYTHONPATH that holds it as `.typing` does (scripts/typecheck makes
it).
"""

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from bench_models import MODELS, family_of, graphs_note, random_denoiser
from step_profile import profiled

from halfbyte.kernels.attention import BACKENDS
from halfbyte.trainer.adapters import add_lora, trained_parameters
from halfbyte.trainer.denoiser import block_names
from halfbyte.trainer.families.block_copies import copies_to
from halfbyte.trainer.families.block_parts import BlockSettings, Keep
from halfbyte.trainer.families.block_stream import BlockStream, keep_on_host, packed_blocks
from halfbyte.trainer.families.host_store import HostStore
from halfbyte.trainer.graphed_denoiser import GraphedDenoiser
from halfbyte.trainer.losses import MSE
from halfbyte.trainer.module import DiffusionModule, Objective
from halfbyte.trainer.optimizers import OPTIMIZERS
from halfbyte.trainer.run_plan import CONTEXT_BYTES
from halfbyte.trainer.samples import Batch
from halfbyte.trainer.shift import ResolutionShift
from halfbyte.trainer.timesteps import LogitNormal
from halfbyte.trainer.weighting import NoWeighting

_KEEP: dict[str, Keep] = {
    "none": "everything",
    "selective": "attention",
    "full": "inputs",
    "offload": "inputs",
}


class TrainedModel:
    """One row's model with its adapters and optimizer, to take steps of any size with."""

    def __init__(
        self, model: str, row: str, rank: int, device: torch.device, *, stream: bool, optimizer: str
    ) -> None:
        self.model, self.row, self.device = model, row, device
        self.family = family_of(model)
        place = keep_on_host(block_names(self.family)) if stream else None
        denoiser: Any = random_denoiser(model, self.family, row, device, place)
        self.base = _gib(torch.cuda.memory_allocated() if device.type == "cuda" else 0)
        add_lora(
            denoiser,
            rank=rank,
            alpha=rank,
            dropout=0.0,
            targets=self.family.lora_targets("all-linear"),
            init="gaussian",
            seed=0,
            fused=row != "peer",
        )
        self.denoiser = denoiser.to(device)
        self.stream: BlockStream | None = None
        if stream:
            self.stream = BlockStream(packed_blocks(denoiser, block_names(self.family)), copies_to(device))
        choice = OPTIMIZERS[optimizer].model_validate({"name": optimizer})
        self.optimizer = choice.build(list(trained_parameters(denoiser).items()))
        self.module = DiffusionModule(
            self.family,
            denoiser,
            Objective(
                LogitNormal(name="logit_normal"),
                ResolutionShift(name="resolution"),
                NoWeighting(name="none"),
                MSE(name="mse"),
                1.0,
            ),
            build_optimizer=torch.optim.AdamW,
            lr_factor=lambda step: 1.0,
            compute_dtype=torch.bfloat16,
            max_grad_norm=None,
            seed=0,
        )

    def settle(self, checkpoint: str, *, whole: bool, compiled: bool, attention: str | None) -> None:
        """Has the blocks run as asked. What is compiled stays so: build the model anew for anything else."""
        if self.row != "peer":
            # torch compiles what runs layer by layer; a block that runs whole is compiled already.
            settings = BlockSettings(
                "everything" if compiled else _KEEP[checkpoint],
                store=HostStore() if checkpoint == "offload" else None,
                whole=whole and not compiled,
                backend=attention,
            )
            self.family.fuse_blocks(self.denoiser, settings)
        if self.row == "peer" or compiled:
            if checkpoint == "none":
                self.denoiser.disable_gradient_checkpointing()
            else:
                self.denoiser.enable_gradient_checkpointing()
        if compiled:
            torch._dynamo.reset()
            self.denoiser.compile_repeated_blocks(fullgraph=self.row != "peer")
        self.denoiser.train()

    def batch(self, number: int, px: int) -> Batch:
        """One sample; its values do not matter, its sizes are the real ones."""
        config, side = self.family.denoiser_config, px // self.family.vae_scale
        tokens, channels = MODELS[self.model][3], self.family.vae_config["latent_channels"]
        return Batch(
            (number,),
            torch.zeros(1, channels, side, side),
            torch.ones(1, channels, side, side),
            torch.ones(1, tokens, config["joint_attention_dim"], dtype=torch.bfloat16),
            torch.ones(1, config["pooled_projection_dim"], dtype=torch.bfloat16),
        ).to(self.device)

    def step(self, number: int, px: int) -> float:
        """Seconds of forward, backward and optimizer."""
        batch = self.batch(number, px)
        _wait(self.device)
        began = time.perf_counter()
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.module.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        _wait(self.device)
        assert torch.isfinite(loss), f"{self.row}: the loss is {loss.item()}"
        return time.perf_counter() - began

    def measure(self, px: int, steps: int, *, graphs: bool) -> dict[str, Any]:
        """Times and peaks of some steps behind three that warm up, the second of which is recorded with `graphs`."""
        self.module.called = GraphedDenoiser(self.denoiser) if graphs else None
        first = self.step(0, px)
        for number in range(1, 3):
            self.step(number, px)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        copied = self.copied
        times = [self.step(number, px) for number in range(3, 3 + steps)]
        return {
            "model": self.model,
            "row": self.row,
            "px": px,
            "median_s": statistics.median(times),
            "min_s": min(times),
            "first_s": first,
            "base_gib": self.base,
            "peak_gib": _gib(self._peak(graphs)),
            "graphs": 0 if self.module.called is None else self.module.called.shapes,
            "copied_gb": (self.copied - copied) / steps / 1e9,
        }

    def _peak(self, graphs: bool) -> int:
        if self.device.type != "cuda":
            return 0
        return torch.cuda.max_memory_reserved() if graphs else torch.cuda.max_memory_allocated()

    @property
    def copied(self) -> int:
        """Bytes of blocks that came to the device so far."""
        return 0 if self.stream is None else self.stream.copied


def run_row(arguments: argparse.Namespace, row: str, device: torch.device) -> None:
    """Measures a row in all the settings asked for, over one model, and prints each as it comes."""
    model = TrainedModel(
        arguments.model,
        row,
        arguments.rank,
        device,
        stream=arguments.stream,
        optimizer=arguments.optimizer,
    )
    for checkpoint in arguments.checkpoint.split(","):
        settings = {"whole": arguments.whole, "compiled": arguments.compile, "attention": arguments.attention}
        model.settle(checkpoint, **settings)
        for px in map(int, arguments.px.split(",")):
            result = model.measure(px, arguments.steps, graphs=arguments.graphs)
            result |= {"checkpoint": checkpoint, **settings}
            note = f" reserved, {graphs_note(result['graphs'])}" if arguments.graphs else ""
            print(
                f"{row:5} {px} px, checkpointing {checkpoint}: {result['median_s']:.3f} s"
                f" (min {result['min_s']:.3f}, first {result['first_s']:.1f}), base {result['base_gib']:.2f},"
                f" peak {result['peak_gib']:.2f} GiB{note}",
                flush=True,
            )
            if model.stream is not None:
                print(
                    f"      {_gib(model.stream.host_bytes):.2f} GiB of blocks on the host, {result['copied_gb']:.2f} GB"
                    f" copied a step, {result['copied_gb'] / result['median_s']:.1f} GB/s",
                    flush=True,
                )
            if arguments.profile:
                kinds, kernels = profiled(lambda px=px: model.step(9, px))  # type: ignore[misc]
                print("      ms: " + ", ".join(f"{kind} {taken:.1f}" for kind, taken in kinds.items()))
                for name, taken, count in kernels[: arguments.profile]:
                    print(f"      {taken:8.2f} ms {count:5d} x {name[:100]}", flush=True)
                result["profile_ms"] = kinds
            if arguments.json:
                with arguments.json.open("a") as file:
                    file.write(json.dumps(result) + "\n")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _gib(count: int) -> float:
    return count / 2**30


def main() -> None:
    """Measures the rows asked for, one after the other, and prints each as it comes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="flux")
    parser.add_argument("--rows", default="ours,bf16,peer", help="which of ours, bf16 and peer")
    parser.add_argument("--px", default="1024", help="sides of the picture, one or several with commas")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument(
        "--checkpoint",
        default="full",
        help=f"train.gradient_checkpointing, one or several of {', '.join(_KEEP)}",
    )
    parser.add_argument("--whole", action=argparse.BooleanOptionalAction, default=True, help="fused blocks")
    parser.add_argument("--attention", choices=BACKENDS, help="without: what needs no probe")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument(
        "--profile", type=int, default=0, help="show where a step goes, and this many kernels"
    )
    parser.add_argument("--json", type=Path, help="append each row to this file, one JSON object a line")
    parser.add_argument(
        "--stream", action="store_true", help="packed blocks on the host, as train.stream_blocks"
    )
    parser.add_argument("--graphs", action="store_true", help="CUDA graphs, as train.cuda_graphs")
    parser.add_argument("--optimizer", choices=sorted(OPTIMIZERS.classes), default="adamw")
    parser.add_argument("--budget", type=float, help="GB of a card to stay within, its context included")
    arguments = parser.parse_args()
    if arguments.stream and (arguments.rows != "ours" or arguments.compile):
        parser.error("--stream is for --rows ours without --compile")
    if arguments.graphs and (
        arguments.stream
        or arguments.compile
        or not arguments.whole
        or "peer" in arguments.rows
        or "offload" in arguments.checkpoint
    ):
        parser.error("--graphs is for ours and bf16, without --stream, --compile, --no-whole and offload")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.graphs and device.type != "cuda":
        parser.error("--graphs needs a CUDA device")
    # cuDNN's attention faults in FLUX's backward.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if arguments.budget:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction((arguments.budget * 2**30 - CONTEXT_BYTES) / total)
    for row in arguments.rows.split(","):
        run_row(arguments, row, device)
        gc.collect()
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

"""Measures seconds and memory of one training step at full size, compared with what users would run instead.

    python -m scripts.bench.train --px 1024,512 --checkpoint none,selective,full --attention cudnn --profile 9
    python -m scripts.bench.train --rows "ours, graphs;bf16, graphs;peer, compiled" --json step.json --markdown step.md
    python -m scripts.bench.train --rows ours --checkpoint full,offload --stream --optimizer adamw_8bit --budget 6
    python -m scripts.bench.train --agree --px 512 --checkpoint none,selective,full,offload

Random weights of the real shapes, batch 1, LoRA on every linear of the blocks, AdamW unless `--optimizer`
names another. `ours` is the NF4 base with double quantization in our layers, `bf16` the same adapters over an
unquantized base, `peer` diffusers with bitsandbytes' layers and stock PEFT. Each step is forward, backward
and optimizer; medians after warm-up. Rows that need a CUDA device are left out where there is none, and so is
checkpointing that a row does not support. The mini model (`--model flux_mini`) runs on the CPU as well.

`, graphs` records a step of each size and launches it as a whole. Its memory counts as allocated only while
it is recorded, so the peak of such rows is what the allocator has reserved. `--stream` leaves the packed
blocks on the host; rows then report the rate of the copies. `--budget` limits the allocator to a card of so
many GB minus a CUDA context. `--agree` times nothing: it compares loss and gradients with a step in fp32 over
the same dequantized weights, which take 48 GB for FLUX. Where halfbyte is not installed, put the folder that
scripts/dev/import_folder prints on PYTHONPATH.
"""

import argparse
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from halfbyte.kernels.attention.ops import BACKENDS, default_backend
from halfbyte.trainer.denoiser.settings import KEPT
from halfbyte.trainer.optim.optimizers import OPTIMIZERS
from halfbyte.trainer.plan.phases import CONTEXT_BYTES
from scripts.bench.models import MODELS, graphs_note
from scripts.bench.step_agreement import agreement, agreement_table
from scripts.bench.step_profile import LowRankSides, profiled
from scripts.bench.train_table import page
from scripts.bench.trained_model import ROW, Row, TrainedModel, gib


def bench(arguments: argparse.Namespace, device: torch.device) -> str:
    """Measures the requested rows one after the other, keeps each result at once, and returns the page."""
    results: list[dict[str, Any]] = []
    head = _head(arguments, device)
    print(f"{head['device']}, torch {torch.__version__}, attention of ours: {head['attention']}", flush=True)

    def keep(result: dict[str, Any]) -> None:
        results.append(result)
        _append(arguments.json, result)

    try:
        for row in _rows(arguments.rows):
            run_row(arguments, row, device, head, keep)
            gc.collect()
            torch._dynamo.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    finally:
        # The other rows still run if one fails.
        text = page(results)
        print(f"\n{text}", end="", flush=True)
        if arguments.markdown is not None:
            arguments.markdown.write_text(text)
    return text


def _head(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Returns the fields that every result records about its run."""
    return {
        "model": arguments.model,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "attention": arguments.attention or default_backend(device, torch.bfloat16),
        "rank": arguments.rank,
        "optimizer": arguments.optimizer,
        "stream": arguments.stream,
        "budget_gb": arguments.budget,
    }


def run_row(
    arguments: argparse.Namespace,
    row: Row,
    device: torch.device,
    head: dict[str, Any],
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Measures a row in all requested settings, over one model; calls `keep` with each result."""
    model: TrainedModel | None = None
    if row.base == "peer":
        head = head | {"attention": "torch's choice"}
    for checkpoint in arguments.checkpoint.split(","):
        state = _left_out(row, checkpoint, device)
        if state is None:
            if model is None:
                given = {"stream": arguments.stream, "optimizer": arguments.optimizer}
                model = TrainedModel(arguments.model, row, arguments.rank, device, **given)
            model.settle(checkpoint, arguments.attention)
        for px in _numbers(arguments.px):
            result = {**head, "row": row.name, "px": px, "checkpoint": checkpoint, "state": state or "done"}
            if model is None or state is not None:
                print(f"{row.name}, checkpointing {checkpoint}: {state}", flush=True)
            else:
                if row.compiled:
                    # Otherwise torch compiles the second size for all sizes, which is slower.
                    torch._dynamo.reset()
                result |= model.measure(px, arguments.steps)
                _tell(model, result)
                if arguments.profile:
                    result["profile_ms"] = _profile(arguments, model, px)
            keep(result)


def _left_out(row: Row, checkpoint: str, device: torch.device) -> str | None:
    """Returns the reason why a row is not measured with this checkpointing; None where it is."""
    if row.needs_cuda and device.type != "cuda":
        return "left out: needs a CUDA device"
    if checkpoint not in row.checkpoints:
        return f"left out: knows {', '.join(row.checkpoints)}"
    return None


def _tell(model: TrainedModel, result: dict[str, Any]) -> None:
    peak = ""
    if result["peak_gib"] is not None:
        reserved = "" if result["graphs"] is None else f" reserved, {graphs_note(result['graphs'])}"
        peak = f", base {result['base_gib']:.2f}, peak {result['peak_gib']:.2f} GiB{reserved}"
    print(
        f"{result['row']}, {result['px']} px, checkpointing {result['checkpoint']}: {result['median_s']:.3f} s"
        f" (min {result['min_s']:.3f}, first {result['first_s']:.1f}){peak}",
        flush=True,
    )
    if model.stream is not None:
        print(
            f"      {gib(model.stream.host_bytes):.2f} GiB of blocks on the host, {result['copied_gb']:.2f} GB"
            f" copied a step, {result['copied_gb'] / result['median_s']:.1f} GB/s",
            flush=True,
        )


def _profile(arguments: argparse.Namespace, model: TrainedModel, px: int) -> dict[str, float]:
    try:
        adapter = LowRankSides.of(model.denoiser, arguments.rank, model.tokens(px))
    except ValueError as error:
        print(f"      adapters count as products: {error}")
        adapter = LowRankSides(frozenset())
    kinds, kernels = profiled(
        lambda: model.step(9, px), adapter=adapter, launched=lambda: model.launched(9, px)
    )
    print("      ms: " + ", ".join(f"{kind} {taken:.1f}" for kind, taken in kinds.items()))
    for name, taken, count in kernels[: arguments.profile]:
        print(f"      {taken:8.2f} ms {count:5d} x {name[:100]}", flush=True)
    return dict(kinds)


def agree(arguments: argparse.Namespace, device: torch.device) -> str:
    """Compares the step at the first size with one in fp32; returns the table."""
    head, px = _head(arguments, device), _numbers(arguments.px)[0]
    checkpoints = arguments.checkpoint.split(",")
    found = agreement(arguments.model, px, arguments.rank, checkpoints, arguments.attention, device)
    for one in found:
        _append(arguments.json, {**head, "px": px, **one})
    text = (
        f"{arguments.model}, {px} px, rank {arguments.rank}, {head['device']}:\n\n{agreement_table(found)}\n"
    )
    print(text, end="", flush=True)
    if arguments.markdown is not None:
        arguments.markdown.write_text(text)
    return text


def _append(file: Path | None, result: dict[str, Any]) -> None:
    if file is not None:
        with file.open("a") as opened:
            opened.write(json.dumps(result) + "\n")


def _rows(names: str | None) -> list[Row]:
    return list(ROW.values()) if names is None else [ROW[name.strip()] for name in names.split(";")]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="flux")
    parser.add_argument("--rows", help=f"some of {'; '.join(ROW)}, separated by semicolons; default: all")
    parser.add_argument("--px", default="1024", help="side of the image, or several separated by commas")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="number of steps to take the median of")
    parser.add_argument(
        "--checkpoint",
        default="full",
        help=f"train.gradient_checkpointing, one or several of {', '.join(KEPT)}",
    )
    parser.add_argument(
        "--attention", choices=BACKENDS, help="backend of our blocks; default: one that needs no probe"
    )
    parser.add_argument(
        "--profile", type=int, default=0, help="print where a step's time goes, and this many kernels"
    )
    parser.add_argument("--json", type=Path, help="append each result to this file, one JSON object per line")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument(
        "--stream", action="store_true", help="keep packed blocks on the host, as train.stream_blocks"
    )
    parser.add_argument("--optimizer", choices=sorted(OPTIMIZERS.classes), default="adamw")
    parser.add_argument(
        "--budget", type=float, help="limit of GB as on a smaller card, CUDA context included"
    )
    parser.add_argument(
        "--agree", action="store_true", help="compare loss and gradients with fp32 at the first px instead"
    )
    return parser


def _refusal(arguments: argparse.Namespace, device: torch.device) -> str | None:
    """Returns what is wrong with the options, in one sentence; None if they are valid."""
    unknown = [name.strip() for name in (arguments.rows or "ours").split(";") if name.strip() not in ROW]
    if unknown:
        return f"--rows: got {'; '.join(unknown)}, accepted: {'; '.join(ROW)}, with semicolons between"
    unknown = [name for name in arguments.checkpoint.split(",") if name not in KEPT]
    if unknown:
        return f"--checkpoint: got {', '.join(unknown)}, accepted: {', '.join(KEPT)}"
    if arguments.stream and arguments.rows != "ours":
        return "--stream is for --rows ours"
    if arguments.agree and (arguments.rows or arguments.stream or arguments.profile):
        return "--agree times nothing: leave out --rows, --stream and --profile"
    if arguments.budget and device.type != "cuda":
        return "--budget: needs a CUDA device, whose allocator it holds to a card's size"
    return None


def main() -> None:
    """Reads the command line and runs the benchmark."""
    parser = _parser()
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refusal = _refusal(arguments, device)
    if refusal is not None:
        parser.error(refusal)
    # cuDNN's attention crashes in FLUX's backward.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if arguments.budget:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction((arguments.budget * 2**30 - CONTEXT_BYTES) / total)
    if arguments.agree:
        agree(arguments, device)
    else:
        bench(arguments, device)


if __name__ == "__main__":
    main()

"""Times one forward and whole images over a 4-bit FLUX, compared with bitsandbytes and bf16.

    python -m scripts.bench.sample --json sample.json --markdown sample.md
    python -m scripts.bench.sample --rows "ours nf4, compiled;bitsandbytes nf4, compiled" --px 1024,512

`ours nf4, recorded` is what `halfbyte sample --compile` does: CUDA graphs of blocks that torch does not
compile. Our compiled rows are recorded too, unless the row says otherwise. The peak of recorded rows is the
memory that the process has reserved, because the memory that a graph works with does not count as allocated.

Weights are random in FLUX.1-dev's shapes, 1024 px, batch 1, LoRA of rank 16 on every linear of the blocks, no
gradients; whole images by the stock pipeline, VAE included. Each row runs in a separate process: if one
fails, crashes or hangs, it is reported and the others still run; the JSON file is complete after every row.
Rows that need a CUDA device are left out where there is none. The mini model (`--model flux_mini`) runs on
the CPU as well. Where halfbyte is not installed, put the folder that scripts/dev/import_folder prints on
PYTHONPATH.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

from halfbyte.kernels.attention.ops import BACKENDS
from halfbyte.trainer.adapters.lora import add_lora, trained_parameters
from halfbyte.trainer.cuda_graphs.forward import RecordedForwards, recorded_forwards
from halfbyte.trainer.denoiser.attention import AttentionShape, choose_attention
from halfbyte.trainer.families.blocks.fused_block import BlockSettings
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.flux.family import pack
from halfbyte.trainer.sample.draw import compile_blocks
from halfbyte.trainer.sample.sampler import PictureSettings, PipelineCall
from scripts.bench.make_checkpoint import shapes_of
from scripts.bench.models import family_of, graphs_note, random_denoiser
from scripts.bench.step_profile import profiled

# 74.4 TFLOP at the 790 TFLOP/s of an H200's matrix units, and the target.
LIMIT_MS = {("flux", 1024): 94.0}
TARGET_MS = {("flux", 1024): 150.0}
_SLOWER = 1.10  # ours may be this much slower than bf16
_MODELS = ("flux", "flux_mini")


@dataclass(frozen=True)
class Row:
    """One way to store the base and run the blocks."""

    name: str
    base: str  # ours, bf16 or peer, see scripts/bench/models.py
    ours: bool = True  # our blocks and adapters, or diffusers' and PEFT's
    whole: bool = True  # fused blocks
    compiled: bool = False
    recorded: bool = False  # forwards are CUDA graphs

    @property
    def needs_cuda(self) -> bool:
        """True for bitsandbytes' layers, graphs and compiled rows; compiling for a CPU takes minutes."""
        return self.base == "peer" or self.compiled or self.recorded


ROWS = (
    Row("ours nf4, recorded", "ours", recorded=True),
    Row("ours nf4, compiled", "ours", compiled=True, recorded=True),
    Row("ours nf4, compiled, launched one by one", "ours", compiled=True),
    Row("ours nf4", "ours"),
    Row("bitsandbytes nf4, compiled", "peer", ours=False, compiled=True),
    Row("bitsandbytes nf4", "peer", ours=False),
    Row("diffusers bf16, compiled", "bf16", ours=False, compiled=True),
    Row("diffusers bf16", "bf16", ours=False),
    Row("ours nf4 by layer, compiled", "ours", whole=False, compiled=True, recorded=True),
    Row("ours nf4 by layer", "ours", whole=False),
    Row("ours bf16, compiled", "bf16", compiled=True, recorded=True),
    Row("ours bf16", "bf16"),
)
_BY_NAME = {row.name: row for row in ROWS}


class SampledModel:
    """A row's transformer and pipeline."""

    def __init__(self, model: str, row: Row, rank: int, attention: str, device: torch.device) -> None:
        self.device, self.family = device, family_of(model)
        denoiser: Any = random_denoiser(model, self.family, row.base, device)
        if rank:
            add_lora(
                denoiser,
                rank=rank,
                alpha=rank,
                dropout=0.0,
                targets=self.family.lora_targets("all-linear"),
                init="gaussian",
                seed=0,
                fused=row.ours,
            )
        if not row.ours:
            # bf16, as diffusers loads adapters for a bf16 model; ours are cast where they are used.
            for parameter in trained_parameters(denoiser).values():
                parameter.data = parameter.data.bfloat16()
        self.denoiser = denoiser.to(device).eval()
        if row.ours:
            self.family.fuse_blocks(denoiser, BlockSettings("inputs", whole=row.whole, backend=attention))
        if row.compiled and row.ours:
            compile_blocks(denoiser, self.family)
        elif row.compiled:
            denoiser.compile_repeated_blocks(fullgraph=row.base != "peer")
        shapes = shapes_of("flux", "full" if model == "flux" else "toy")
        vae = AutoencoderKL.from_config(shapes.vae).to(device, torch.bfloat16)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        self.pipeline = FluxPipeline(scheduler, vae, None, None, None, None, denoiser)
        self.pipeline.set_progress_bar_config(disable=True)
        self.text = _text(self.family, device)

    @torch.no_grad()
    def forward(self, px: int) -> float:
        """Returns the seconds of one sampling step's forward."""
        side, channels = px // self.family.vae_scale, self.family.vae_config["latent_channels"]
        noise = torch.ones(1, channels, side, side, device=self.device, dtype=torch.bfloat16)
        sigma = torch.full((1,), 0.5, device=self.device)
        _wait(self.device)
        began = time.perf_counter()
        velocity = self.family.predict(self.denoiser, noise, sigma, self.text, 3.5)
        _wait(self.device)
        seconds = time.perf_counter() - began
        assert velocity.shape == noise.shape
        assert torch.isfinite(pack(velocity)).all(), "the prediction is not finite"
        return seconds

    def picture(self, px: int, steps: int) -> float:
        """Returns the seconds of a whole image."""
        settings = PictureSettings(steps, 3.5, px, px)
        call = PipelineCall(self.family, self.pipeline, self.text, settings, self.device, torch.bfloat16)
        _wait(self.device)
        began = time.perf_counter()
        picture = call.draw(self.text, 0)
        assert picture.size == (px, px)
        return time.perf_counter() - began


def _text(family: Family, device: torch.device) -> TextEmbedding:
    draws = torch.Generator().manual_seed(0)
    config = family.denoiser_config
    shapes = (1, family.text_tokens, config["joint_attention_dim"]), (1, config["pooled_projection_dim"])
    return TextEmbedding(
        *(torch.randn(shape, generator=draws).to(device, torch.bfloat16) for shape in shapes)
    )


def measure(arguments: argparse.Namespace, row: Row, keep: Callable[[list[dict[str, Any]]], None]) -> None:
    """Measures a row at every size in this process; calls `keep` with the results after each new one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = SampledModel(arguments.model, row, arguments.rank, arguments.attention, device)
    with recorded_forwards(model.denoiser) if row.recorded else nullcontext() as forwards:
        _measure(arguments, model, forwards, keep)


def _measure(
    arguments: argparse.Namespace,
    model: SampledModel,
    forwards: RecordedForwards | None,
    keep: Callable[[list[dict[str, Any]]], None],
) -> None:
    device, results = model.device, list[dict[str, Any]]()
    for px in _numbers(arguments.px):
        first = model.forward(px)
        for _ in range(2):
            model.forward(px)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = [model.forward(px) for _ in range(arguments.forwards)]
        found: dict[str, Any] = {
            "px": px,
            "forward_ms": 1e3 * statistics.median(times),
            "fastest_ms": 1e3 * min(times),
            "first_s": first,
            "peak_gib": _peak(recorded=forwards is not None) / 2**30 if device.type == "cuda" else None,
            "graphs": None if forwards is None else forwards.shapes,
            "pictures_s": {},
        }
        results.append(found)
        keep(results)
        # The pipeline calls the transformer with slightly different arguments, so blocks are compiled again.
        model.picture(px, 2)
        for steps in _numbers(arguments.steps):
            found["pictures_s"][str(steps)] = model.picture(px, steps)
            keep(results)
        if device.type == "cuda":
            found["profile_ms"] = dict(profiled(lambda px=px: model.forward(px))[0])  # type: ignore[misc]
            keep(results)


def _peak(*, recorded: bool) -> int:
    return torch.cuda.max_memory_reserved() if recorded else torch.cuda.max_memory_allocated()


def run_apart(command: Sequence[str], found: Path, seconds: float) -> tuple[str, list[dict[str, Any]]]:
    """Runs a command that writes its results to a file; returns how it ended and the results until then."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        state = f"stopped after {seconds:.0f} s"
    else:
        said = ended.stderr.strip().splitlines() or ["it said nothing"]
        state = "done" if ended.returncode == 0 else f"failed ({ended.returncode}): {said[-1][:300]}"
        if ended.returncode != 0:
            print(ended.stderr[-3000:], file=sys.stderr)
    return state, json.loads(found.read_text()) if found.is_file() else []


def bench(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs all rows one after the other and keeps the results after each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attention = arguments.attention or _attention(arguments, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    head = {"model": arguments.model, "device": name, "torch": torch.__version__, "rank": arguments.rank}
    print(f"{name}, torch {torch.__version__}, attention of ours: {attention}", flush=True)
    began, rows = time.perf_counter(), []
    for row in _rows(arguments.rows):
        left = arguments.seconds - (time.perf_counter() - began)
        results: list[dict[str, Any]] = []
        if row.needs_cuda and device.type != "cuda":
            state = "left out: needs a CUDA device"
        elif left <= 0:
            state = f"left out: the {arguments.seconds} s are over"
        else:
            with tempfile.TemporaryDirectory() as folder:
                found = Path(folder) / "found.json"
                state, results = run_apart(_command(arguments, row, attention, found), found, left)
        rows.append({"row": row.name, "state": state, "results": results})
        print(f"{row.name}: {state}" + "".join(f"; {_told(result)}" for result in results), flush=True)
        if arguments.json is not None:
            arguments.json.write_text(
                json.dumps(head | {"attention": attention, "rows": rows}, indent=1) + "\n"
            )
    return rows


def _command(arguments: argparse.Namespace, row: Row, attention: str, found: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "scripts.bench.sample", "--one", row.name),
        *("--found", str(found), "--model", arguments.model),
        *("--px", arguments.px, "--rank", str(arguments.rank), "--forwards", str(arguments.forwards)),
        *("--steps", arguments.steps, "--attention", attention),
    ]


def _attention(arguments: argparse.Namespace, device: torch.device) -> str:
    """Returns the backend that training would choose for the largest image."""
    family = family_of(arguments.model)
    side = max(_numbers(arguments.px)) // family.vae_scale
    shape = AttentionShape(
        family.image_tokens(side, side) + family.text_tokens, *family.attention_heads, torch.bfloat16
    )
    with tempfile.TemporaryDirectory() as folder:
        return choose_attention("auto", shape, device, Path(folder)).backend


def table(arguments: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> str:
    """Returns Markdown: one row per line, then the limit and the verdicts."""
    steps = _numbers(arguments.steps)
    lines = []
    for px in _numbers(arguments.px):
        heads = [f"{px} px", "one forward", *(f"{count} steps" for count in steps), "first forward", "peak"]
        lines += [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
        forwards = {}
        for row in rows:
            result = next((found for found in row["results"] if found["px"] == px), None)
            if result is None:
                lines.append(f"| {row['row']} | {row['state']} |{' |' * (len(heads) - 2)}")
                continue
            forwards[row["row"]] = result["forward_ms"]
            note = _graphs_note(result) + ("" if row["state"] == "done" else f" ({row['state']})")
            lines.append(f"| {row['row']}{note} | {' | '.join(_cells(result, steps))} |")
        lines += ["", *_verdicts(arguments.model, px, forwards), ""]
    return "\n".join(lines)


def _graphs_note(result: dict[str, Any]) -> str:
    note = graphs_note(result["graphs"])
    return f", {note}" if note else ""


def _cells(result: dict[str, Any], steps: Sequence[int]) -> list[str]:
    pictures = [result["pictures_s"].get(str(count)) for count in steps]
    return [
        f"{result['forward_ms']:.1f} ms (fastest {result['fastest_ms']:.1f})",
        *("not measured" if seconds is None else f"{seconds:.2f} s" for seconds in pictures),
        f"{result['first_s']:.1f} s",
        "" if result["peak_gib"] is None else f"{result['peak_gib']:.1f} GiB{_reserved(result)}",
    ]


def _reserved(result: dict[str, Any]) -> str:
    return "" if result["graphs"] is None else " reserved"


def _verdicts(model: str, px: int, forwards: dict[str, float]) -> list[str]:
    lines = []
    if (model, px) in LIMIT_MS:
        lines.append(
            f"Limit {LIMIT_MS[model, px]:.0f} ms, target for ours with --compile {TARGET_MS[model, px]:.0f} ms."
        )
    for mode in ("", ", compiled"):
        ours, bf16 = forwards.get(f"ours nf4{mode}"), forwards.get(f"diffusers bf16{mode}")
        if mode:
            ours = forwards.get("ours nf4, recorded", ours)
        if ours is not None and mode and (model, px) in TARGET_MS:
            held = "held" if ours <= TARGET_MS[model, px] else "missed"
            lines.append(f"Ours with --compile: {ours:.1f} ms, {held}.")
        if ours is not None and bf16 is not None:
            held = "held" if ours <= _SLOWER * bf16 else "missed"
            lines.append(
                f"Against bf16{mode}: {ours / bf16:.2f} of its time, target at most {_SLOWER}, {held}."
            )
        peer = forwards.get(f"bitsandbytes nf4{mode}")
        if ours is not None and peer is not None:
            lines.append(f"Against bitsandbytes{mode}: {ours / peer:.2f} of its time.")
    return lines


def _told(result: dict[str, Any]) -> str:
    pictures = ", ".join(f"{steps} steps {seconds:.2f} s" for steps, seconds in result["pictures_s"].items())
    forward = f"{result['forward_ms']:.1f} ms a forward{_graphs_note(result)}"
    return f"{result['px']} px {forward}, {pictures or 'no image'}"


def _rows(names: str | None) -> list[Row]:
    return list(ROWS) if names is None else [_BY_NAME[name.strip()] for name in names.split(";")]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Reads the command line and runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=_MODELS, default="flux")
    parser.add_argument(
        "--rows", help=f"some of {'; '.join(_BY_NAME)}, separated by semicolons; default: all"
    )
    parser.add_argument("--px", default="1024", help="side of the image, or several separated by commas")
    parser.add_argument("--steps", default="28,50", help="steps of whole images, separated by commas")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter; 0: only the base")
    parser.add_argument("--forwards", type=int, default=10, help="number of forwards to take the median of")
    parser.add_argument(
        "--attention", choices=BACKENDS, help="backend of our blocks; default: the probe's choice"
    )
    parser.add_argument(
        "--seconds", type=float, default=1500, help="time limit; no further row starts after it"
    )
    parser.add_argument("--json", type=Path, help="write all results to this file, again after each row")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--one", choices=_BY_NAME, help=argparse.SUPPRESS)
    parser.add_argument("--found", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = [name for name in (arguments.rows or ROWS[0].name).split(";") if name.strip() not in _BY_NAME]
    if unknown:
        parser.error(f"--rows: got {', '.join(unknown)}; accepted: {'; '.join(_BY_NAME)}")
    if arguments.one is not None:
        measure(arguments, _BY_NAME[arguments.one], lambda found: _keep(arguments.found, found))
        return
    text = table(arguments, bench(arguments))
    print(text)
    if arguments.markdown is not None:
        arguments.markdown.write_text(text)


def _keep(file: Path, found: list[dict[str, Any]]) -> None:
    """Writes the file atomically, because the process may be killed while it writes."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(found))
    partial.replace(file)


if __name__ == "__main__":
    main()

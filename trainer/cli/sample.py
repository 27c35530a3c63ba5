"""`halfbyte sample`: its options, and how it ends."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from halfbyte.trainer.cli.console import configure_logging, library_imports, reported_errors
from halfbyte.trainer.cli.interrupts import INTERRUPTED
from halfbyte.trainer.runtime.world import read_world
from halfbyte.trainer.sample.request import SampleRequest, parse_seeds, parse_strengths, read_prompts


def sample_command(
    source: Annotated[
        str,
        typer.Argument(
            help="A run's folder; an adapter's file or folder, of diffusers, PEFT, ComfyUI or kohya, or its Hub"
            " repository (owner/name or owner/name@revision); or a pipeline, a folder or a Hub repository, to draw"
            " without an adapter."
        ),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="What to draw; may be given again. Without it a run's own prompts."),
    ] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="More prompts, one a line.")] = None,
    strength: Annotated[
        str | None, typer.Option(help="The adapter's, one or several with commas: 0 is the base alone. [1]")
    ] = None,
    seed: Annotated[
        str | None,
        typer.Option(
            help="Of the noise, one or several with commas, for every prompt. [a run: as it drew its own; else 0]"
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="So many seeds, from --seed on.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps. [the run's, else 28]")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0, help="As the pipeline takes it. [the run's, else 3.5]")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Pixels. [the run's, else 1024]")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels. [the run's, else 1024]")] = None,
    checkpoint: Annotated[
        int | None, typer.Option(min=0, help="Of a run: the checkpoint of this step. [the newest]")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="A new folder. [pictures/001 and so on, in the run's folder or here]")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="An adapter's base: a folder or a Hub repository. [as PEFT's file says]"),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="A commit, tag or branch of the Hub repository.")
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option(help="The transformer: nf4, int8 or none. [as the run or as stored, else nf4]"),
    ] = None,
    text_encoder_quant: Annotated[
        str | None, typer.Option(help="T5: auto, none, int8 or nf4. [the run's, else auto]")
    ] = None,
    max_sequence_length: Annotated[
        int | None, typer.Option(min=1, max=512, help="T5 tokens. [the run's, else the model's]")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="bfloat16, float16 or float32. [the run's, else bfloat16, on the CPU float32]"),
    ] = None,
    offload: Annotated[
        str,
        typer.Option(
            help="none: text encoders, transformer and VAE on the device one after the other; model or sequential:"
            " in host memory, each model or each layer on the device while it computes."
        ),
    ] = "none",
    device_map: Annotated[
        str | None, typer.Option(help="Spread each model: auto (devices, then host memory) or balanced.")
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="On a GPU, record the transformer's forward as a CUDA graph; where it cannot be (--offload, int8), or"
            " on a CPU, compile its blocks: slow to start, then faster.",
        ),
    ] = False,
    cache: Annotated[
        Path | None, typer.Option(help="For embeddings and packed bases. [the run's, else ~/.cache/halfbyte]")
    ] = None,
) -> None:
    """Draw pictures with a run or an adapter, and a grid of them.

    Over the quantized base, at several strengths and seeds.

    Exit codes: 0 done, 2 source, model or option, 4 Hub, 6 out of memory, 130 interrupted (what was drawn is kept).
    """
    with reported_errors() as command:
        request = SampleRequest(
            source,
            model=model,
            revision=revision,
            checkpoint=checkpoint,
            prompts=read_prompts(prompt or (), prompts_file),
            strengths=None if strength is None else parse_strengths(strength),
            seeds=parse_seeds(seed, seeds),
            steps=steps,
            guidance_scale=guidance_scale,
            width=width,
            height=height,
            quant=quant,
            text_encoder_quant=text_encoder_quant,
            max_sequence_length=max_sequence_length,
            dtype=dtype,
            offload=offload,
            device_map=device_map,
            compiled=compiled,
            cache=cache,
            output=output,
        )
        world = command.world = read_world()
        configure_logging(world)
        with library_imports():
            from halfbyte.trainer.sample.run import sample

        finished = sample(request, world, Console(soft_wrap=True))
    if not finished:
        raise typer.Exit(INTERRUPTED)

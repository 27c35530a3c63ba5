"""The command `halfbyte sample`: its options and exit codes."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from halfbyte.trainer.cli.console import (
    DebugOption,
    configure_logging,
    library_imports,
    reported_errors,
    slow_imports,
)
from halfbyte.trainer.cli.interrupts import INTERRUPTED
from halfbyte.trainer.sample.request import SampleRequest, parse_seeds, parse_strengths, read_prompts


def sample_command(
    source: Annotated[
        str,
        typer.Argument(
            help="One of: the folder of a run; a LoRA file or folder in the format of diffusers, PEFT, ComfyUI or"
            " kohya; the Hub repository of an adapter (owner/name or owner/name@revision); or a pipeline, as a folder"
            " or Hub repository, to generate without an adapter."
        ),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", help="The text to generate from. Can be repeated. [the run's sample.prompts]"
        ),
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="A text file with more prompts, one per line.")
    ] = None,
    strength: Annotated[
        str | None,
        typer.Option(
            help="Adapter strength, or several separated by commas. 0 generates with the base only. [1]"
        ),
    ] = None,
    seed: Annotated[
        str | None,
        typer.Option(
            help="Noise seed, or several separated by commas; each is used for every prompt."
            " [the seeds of the run's own samples, else 0]"
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Number of consecutive seeds, starting at --seed.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Number of sampling steps. [the run's, else 28]")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(min=0, help="Guidance scale, passed to the pipeline unchanged. [the run's, else 3.5]"),
    ] = None,
    width: Annotated[int | None, typer.Option(help="Image width in pixels. [the run's, else 1024]")] = None,
    height: Annotated[int | None, typer.Option(help="Image height in pixels. [the run's, else 1024]")] = None,
    checkpoint: Annotated[
        int | None, typer.Option(min=0, help="For a run: the step of the checkpoint to use. [the newest]")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="A new folder for the images."
            " [pictures/001, pictures/002 and so on, in the run's folder or the current folder]"
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="For an adapter: its base model, as a folder or Hub repository."
            " [the base named in adapter_config.json]"
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="The commit, tag or branch of the Hub repository to use.")
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option(
            help="Quantization of the transformer: nf4, int8 or none. [the run's, or as stored, else nf4]"
        ),
    ] = None,
    text_encoder_quant: Annotated[
        str | None,
        typer.Option(help="Quantization of T5: auto, none, int8 or nf4. [the run's, else auto]"),
    ] = None,
    max_sequence_length: Annotated[
        int | None,
        typer.Option(min=1, max=512, help="Maximum number of T5 tokens. [the run's, else the model's]"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Compute dtype: bfloat16, float16 or float32."
            " [the run's, else bfloat16, or float32 on the CPU]"
        ),
    ] = None,
    offload: Annotated[
        str,
        typer.Option(
            help="none: load text encoders, transformer and VAE onto the device one after another. model or"
            " sequential: keep the models in host memory and move each model (model) or each layer (sequential) to the"
            " device while it computes."
        ),
    ] = "none",
    device_map: Annotated[
        str | None,
        typer.Option(
            help="Spread each model over several devices: auto (fill the devices in order, then host memory) or"
            " balanced."
        ),
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Start slower, then generate faster. On a GPU, record the transformer's forward as a CUDA graph. On a"
            " CPU, or where recording is not possible (--offload, int8), compile the transformer's blocks.",
        ),
    ] = False,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Cache folder for text embeddings and packed bases. [the run's, else ~/.cache/halfbyte]"
        ),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Generate images with a run or an adapter, and a grid of them.

    The images come from the quantized base with the adapter, for every combination of prompt, strength and
    seed.

    Exit codes: 0 done, 2 source, model or option error, 4 Hub error, 6 out of memory or disk
    space, 128 + N stopped by signal N (130: Ctrl-C; finished images are kept), 1 an unexpected error.
    """
    with reported_errors(debug=debug) as command:
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
        with slow_imports():
            from halfbyte.trainer.runtime.world import read_world

        world = command.world = read_world()
        configure_logging(world)
        with library_imports():
            from halfbyte.trainer.sample.run import sample

        finished = sample(request, world, Console(soft_wrap=True))
    if not finished:
        raise typer.Exit(INTERRUPTED)

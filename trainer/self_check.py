"""An export proves itself before anyone is told that it is done: stock diffusers loads it, in a fresh process.

Our side of the comparison are our own layers over the same weights, in fp32, where both sides agree to rounding. A
large model is compared on one block of each kind and what is around the blocks, so that 24 GB of FLUX need 3; names,
ranks and scales are always counted on the whole. See `stock_check` for the other side.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from halfbyte.quant.convert import QuantizedLinear
from halfbyte.quant.load import load_quantized
from halfbyte.quant.lora import fused_config
from halfbyte.quant.serialize import (
    CONFIG_FILE,
    base_tensors,
    quantization_config,
    read_quantization_config,
    split_statistic,
)
from halfbyte.quant.shards import write_text, write_weights
from halfbyte.trainer.errors import ExportError
from halfbyte.trainer.families.base import Family, TextEmbedding
from halfbyte.trainer.lora_formats import LoraFormat, file_name
from halfbyte.trainer.saved_adapter import LoraLayer, SavedAdapter

_PROGRAM = Path(__file__).with_name("stock_check.py")
_TIMEOUT = 1800  # seconds
_WHOLE_BYTES = 2 * 10**8  # a base up to this size is compared whole
_SHARD_BYTES = 2 * 10**9
# Of the relative error of a prediction in fp32. bitsandbytes dequantizes to the dtype that the weight had before it
# was quantized, and takes int8's inputs through fp16.
_BOUNDS = {"plain": 1e-3, "nf4": 1e-2, "fp4": 1e-2, "int8": 5e-2}
_PROBE = (8, 24)  # side of the latent in pixels, tokens of text


@dataclass(frozen=True)
class SelfCheck:
    """What was proven of an export."""

    checked: tuple[str, ...]
    left_out: tuple[str, ...]
    moved: float  # by the adapter, of the prediction at the checked input


@dataclass(frozen=True)
class _Kept:
    """The part of the model that is compared."""

    config: Mapping[str, Any]
    blocks: Mapping[str, str] | None  # block -> its name in the part; None: the whole model

    def name(self, name: str, all_blocks: Sequence[str]) -> str | None:
        """What a tensor or layer is called in the part; None where it is not in it."""
        if self.blocks is None:
            return name
        for block in all_blocks:
            if name.startswith(f"{block}."):
                own = self.blocks.get(block)
                return None if own is None else own + name.removeprefix(block)
        return name


def self_check(
    family: Family,
    denoiser: nn.Module,
    adapter: SavedAdapter,
    folder: Path,
    formats: Sequence[LoraFormat],
    *,
    name: str,
    device: torch.device,
    work: Path,
) -> SelfCheck:
    """Has stock diffusers load what is in `folder`, see `lora_formats`, over the base of `denoiser`.

    work: an empty folder for what the other process reads. Raises ExportError with every key and bound that fails.
    """
    layers = adapter.layers()
    kept = _part(family, denoiser, layers)
    every = [block for kind in family.block_kinds() for block in kind]
    present = {path: own for path in layers if (own := kept.name(path, every)) is not None}
    bases, left_out = _write_bases(denoiser, kept, every, work)
    inputs = _inputs(family)
    expected = {f"input.{key}": tensor for key, tensor in inputs.items()}
    for base, base_folder in bases.items():
        model = load_quantized(family.denoiser_class, base_folder, None, dtype=torch.float32, device=device)
        expected[f"{base}.bare"] = _prediction(model, inputs, device)
        _adapt(model, {own: layers[path] for path, own in present.items()}, dora=adapter.is_dora)
        expected[f"{base}.adapted"] = _prediction(model, inputs, device)
        del model
    save_file(expected, work / "expected.safetensors")
    save_file(dict(adapter.tensors), work / "trained.safetensors")
    job = {
        "transformer": family.denoiser_class.__name__,
        "pipeline": family.pipeline_class.__name__,
        "components": [*family.text_components, "vae", "scheduler"],
        "config": _plain_config(family.denoiser_config),
        "originals": [original.name for original in family.original_names()],
        "files": {kind: str((folder / file_name(name, kind)).resolve()) for kind in formats},
        "layers": {path: layer.scale for path, layer in layers.items()},
        "present": present,
        "dora": adapter.is_dora,
        "bases": {base: str(base_folder.resolve()) for base, base_folder in bases.items()},
        "bounds": _BOUNDS,
        "device": device.type,
        "expected": str((work / "expected.safetensors").resolve()),
        "trained": str((work / "trained.safetensors").resolve()),
        "answer": str((work / "answer.json").resolve()),
    }
    write_text(json.dumps(job), work / "job.json")
    answer = _answer(work)
    if answer["failures"]:
        raise ExportError("export: the self-check failed:\n  " + "\n  ".join(answer["failures"]))
    if kept.blocks is not None:
        left_out = (*left_out, f"predictions of other blocks than {', '.join(kept.blocks)}")
    return SelfCheck(tuple(answer["checked"]), left_out, float(answer["moved"]))


def _part(family: Family, denoiser: nn.Module, layers: Mapping[str, LoraLayer]) -> _Kept:
    config = _plain_config(family.denoiser_config)
    if sum(tensor.nbytes for tensor in base_tensors(denoiser).values()) <= _WHOLE_BYTES:
        return _Kept(config, None)
    # Of each kind the block with the most adapters: a run may train few of them.
    chosen = [
        max(kind, key=lambda block: sum(path.startswith(f"{block}.") for path in layers))
        for kind in family.block_kinds()
        if kind
    ]
    names, counts = {}, dict[str, int]()
    for block in chosen:
        stem = block.rpartition(".")[0]
        names[block] = f"{stem}.{counts.setdefault(stem, 0)}"
        counts[stem] += 1
    return _Kept(family.config_of_blocks(chosen), names)


def _plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value for key, value in config.items() if key not in ("quantization_config", "_name_or_path")
    }


def _write_bases(
    denoiser: nn.Module, kept: _Kept, every: Sequence[str], work: Path
) -> tuple[dict[str, Path], tuple[str, ...]]:
    """The part's weights as they are held, and dequantized; what cannot be checked here is said."""
    packed = {
        f"{path.removesuffix('.base_layer')}.weight": module
        for path, module in denoiser.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    held: dict[str, dict[str, Tensor]] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in base_tensors(denoiser).items():
        own = kept.name(name, every)
        if own is None:
            continue
        statistic = split_statistic(name)
        group = name if statistic is None or statistic[0] not in packed else statistic[0]
        held.setdefault(group, {})[own] = tensor
        if name in packed:
            plain[own] = packed[name].dequantize(torch.float32)
        elif group == name:
            plain[own] = tensor.float()
    _write_base(work / "plain", kept.config, [{name: tensor} for name, tensor in plain.items()])
    bases = {"plain": work / "plain"}
    model: Any = denoiser
    if not packed:
        return bases, ()
    recipe = replace(
        read_quantization_config(model.config["quantization_config"], "the model"),
        compute_dtype=torch.float32,
    )
    if importlib.util.find_spec("bitsandbytes") is None:
        return bases, ("the quantized base, for which stock diffusers needs bitsandbytes",)
    config = dict(kept.config) | {"quantization_config": quantization_config(recipe)}
    _write_base(work / recipe.quant_type, config, list(held.values()))
    return bases | {recipe.quant_type: work / recipe.quant_type}, ()


def _write_base(folder: Path, config: Mapping[str, Any], groups: list[dict[str, Tensor]]) -> None:
    folder.mkdir()
    write_text(json.dumps(config), folder / CONFIG_FILE)
    write_weights(groups, folder, max_shard_bytes=_SHARD_BYTES)


def _inputs(family: Family) -> dict[str, Tensor]:
    """What the family would call the denoiser with, at a small fixed input."""
    side, tokens = _PROBE
    config, draws = family.denoiser_config, torch.Generator().manual_seed(0)
    noisy = torch.randn(1, family.vae_config["latent_channels"], side, side, generator=draws)
    text = TextEmbedding(
        torch.randn(1, tokens, config["joint_attention_dim"], generator=draws),
        torch.randn(1, config["pooled_projection_dim"], generator=draws),
    )
    called = _Called()
    family.predict(called, noisy, torch.tensor([0.5]), text, 1.0)
    return {key: tensor.contiguous() for key, tensor in called.inputs.items() if isinstance(tensor, Tensor)}


class _Called(nn.Module):
    """Stands where the denoiser would, and notes what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[str, Any] = {}

    def forward(self, **inputs: Any) -> tuple[Tensor]:
        self.inputs = inputs
        return (inputs["hidden_states"],)


@torch.no_grad()
def _prediction(model: Any, inputs: Mapping[str, Tensor], device: torch.device) -> Tensor:
    tensors = {name: tensor.to(device) for name, tensor in inputs.items()}
    prediction: Tensor = model(**tensors, return_dict=False)[0]
    return prediction.float().cpu().contiguous()


def _adapt(model: Any, layers: Mapping[str, LoraLayer], *, dora: bool) -> None:
    """Our own adapted layers with these weights."""
    config = LoraConfig(
        r=1,
        lora_alpha=1,
        target_modules=list(layers),
        # A pattern fits ends of names: from the start only itself.
        rank_pattern={f"^{path}": layer.rank for path, layer in layers.items()},
        alpha_pattern={f"^{path}": layer.scale * layer.rank for path, layer in layers.items()},
        use_dora=dora,
    )
    model.add_adapter(fused_config(config), adapter_name="check")
    for path, layer in layers.items():
        module = model.get_submodule(path)
        values = {"lora_A": layer.down, "lora_B": layer.up}
        if layer.lengths is not None:
            values["lora_magnitude_vector"] = layer.lengths
        for kind, value in values.items():
            parameter = getattr(module, kind)["check"].weight
            parameter.data = value.to(parameter.device, torch.float32)


def _answer(work: Path) -> dict[str, Any]:
    # -P: the program's own folder has names in it that must not hide other packages.
    command = [sys.executable, "-P", str(_PROGRAM), str(work / "job.json")]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"export: the self-check took longer than {_TIMEOUT} s and was ended") from error
    if done.returncode != 0:
        last = "\n  ".join(done.stderr.strip().splitlines()[-8:])
        raise ExportError(
            "export: stock diffusers could not load the export; nothing was put in place, and the checkpoints are whole"
            f" (halfbyte export RUN --no-self-check exports them unchecked):\n  {last}"
        )
    answer: dict[str, Any] = json.loads((work / "answer.json").read_text(encoding="utf-8"))
    return answer

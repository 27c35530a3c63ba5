"""An export proves itself before anyone is told that it is done: stock diffusers loads it, in a fresh process.

Our side of the comparison are our own layers over the same weights, in fp32, where both sides agree to rounding; stock
diffusers also loads in bf16, within a wider bound. The files of an exported model are held against what was in memory
bit by bit. A large model is loaded and compared on one block of each kind and what is around the blocks, so that 24 GB
of FLUX need 3; names, ranks and scales are always counted on the whole. See `stock_check` and
`stock_text_encoder_check` for the other side.
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
from transformers import T5EncoderModel

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.files.atomic import write_file
from halfbyte.quant.files.shards import TEXT_WEIGHTS_FILE
from halfbyte.quant.load.text_encoder import load_text_encoder
from halfbyte.quant.load.transformer import load_quantized
from halfbyte.quant.lora.layers import fused_config
from halfbyte.trainer.adapters.formats import PEFT_FILE, LoraFormat, file_name
from halfbyte.trainer.adapters.lora import ADAPTER
from halfbyte.trainer.adapters.saved import LoraLayer, SavedAdapter
from halfbyte.trainer.errors import ExportError
from halfbyte.trainer.export.check_part import (
    base_groups,
    is_large,
    part_of,
    plain_config,
    quant_recipe_of,
    quantized_config,
    write_part,
)
from halfbyte.trainer.export.text_encoder import WrittenTextEncoder, write_first_block
from halfbyte.trainer.export.verify import check_written, check_written_denoiser
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.families.family import Family

_PROGRAM = Path(__file__).parent / "stock" / "check_transformer.py"
_TEXT_PROGRAM = Path(__file__).parent / "stock" / "check_text_encoder.py"
_TIMEOUT = 1800  # seconds
# Of the relative error of a prediction in fp32. bitsandbytes dequantizes to the dtype that the weight had before it
# was quantized, and takes int8's inputs through fp16.
_BOUNDS = {"plain": 1e-3, "nf4": 1e-2, "fp4": 1e-2, "int8": 5e-2}
# The same where stock diffusers computes in bf16, whose products are known to 0.4 %, through a few blocks.
_BOUND_BF16 = 1e-1
# A part of the effect that fp32 may lose in the prediction it is a difference of.
_NOISE = 1e-5
_PROBE = (8, 24)  # side of the latent in pixels, tokens of text


@dataclass(frozen=True)
class SelfCheck:
    """What was proven of an export."""

    checked: tuple[str, ...]
    left_out: tuple[str, ...]
    unread: tuple[str, ...]  # layers that stock diffusers does not read of a format
    moved: float  # by the adapter, of the prediction at the checked input


class StockCheck:
    """Collects what is exported of a run, and has stock diffusers and transformers load all of it."""

    def __init__(self, family: Family, denoiser: nn.Module, adapter: SavedAdapter, work: Path) -> None:
        """work: an empty folder for what the other process reads; denoiser: the base, with or without adapters."""
        self._family, self._work, self._adapter = family, work, adapter
        self._device = next(denoiser.parameters()).device
        self._layers = _as_trained(denoiser, adapter.layers())
        self._kept = part_of(family, denoiser, self._layers)
        self._every = [block for kind in family.block_kinds() for block in kind]
        self._inputs = _inputs(family)
        self._expected = {f"input.{key}": tensor for key, tensor in self._inputs.items()}
        self._files: dict[str, str] = {}
        self._bases: list[dict[str, Any]] = []
        self._checked: list[str] = []
        self._left_out: list[str] = []
        self._text_encoder: dict[str, Any] | None = None
        if self._kept.blocks is not None:
            self._left_out.append(f"predictions of other blocks than {', '.join(self._kept.blocks)}")

    def add_adapter(
        self, denoiser: nn.Module, folder: Path, formats: Sequence[LoraFormat], *, name: str
    ) -> None:
        """The adapter's files in `folder`, see `lora_formats`, on the base that `denoiser` holds now."""
        # diffusers' file is always there, and is what is pushed.
        for kind in dict.fromkeys(("diffusers", *formats)):
            self._files[kind] = str((folder / file_name(name, kind)).resolve())
        if "diffusers" in formats:
            self._files["peft"] = str((folder / PEFT_FILE).resolve())
        plain, packed = base_groups(denoiser, self._kept, self._every)
        place = self._work / "plain"
        write_part(place, self._kept.config, plain)
        self._predict("plain", place, None, adapted=True)
        self._add("plain", place, "plain", kinds=list(self._files))
        self._add("bf16", place, "plain", kinds=["diffusers"], bf16=True)
        recipe = quant_recipe_of(denoiser)
        if recipe is not None and self._has_bitsandbytes():
            place = self._work / recipe.quant_type
            exact = replace(recipe, compute_dtype=torch.float32)
            write_part(place, quantized_config(self._kept.config, exact), packed)
            self._predict(recipe.quant_type, place, recipe, adapted=True)
            self._add(recipe.quant_type, place, recipe.quant_type, kinds=["diffusers"])

    def add_denoiser(self, name: str, denoiser: nn.Module, folder: Path, *, adapted: bool) -> None:
        """What `denoiser` was exported as into `folder`; raises ExportError where the files are something else.

        adapted: whether the adapter belongs on it.
        """
        check_written_denoiser(folder, denoiser)
        self._checked.append(f"{name}/: every tensor and setting as in memory")
        recipe = quant_recipe_of(denoiser)
        assert recipe is not None
        if not self._has_bitsandbytes():
            return
        place = folder.resolve()
        if self._kept.blocks is not None:
            _, packed = base_groups(denoiser, self._kept, self._every)
            place = self._work / name
            write_part(place, quantized_config(self._kept.config, recipe), packed)
        self._predict(name, place, recipe, adapted=adapted)
        kinds = ["diffusers"] if adapted else []
        self._add(f"exported {name}/", place, name, kinds=kinds, bf16=True)

    def add_text_encoder(self, written: WrittenTextEncoder, folder: Path) -> None:
        """T5, exported into `folder`; raises ExportError where the files are not what was in memory."""
        check_written(folder, written.tensors, written.config, TEXT_WEIGHTS_FILE)
        self._checked.append("T5: every tensor and setting as in memory")
        if not self._has_bitsandbytes():
            return
        place = folder.resolve()
        if is_large(written.tensors):
            place = self._work / "text_encoder"
            place.mkdir()
            write_first_block(written, place)
            self._left_out.append("the encoding of other blocks of T5 than the first")
        model = load_text_encoder(T5EncoderModel, place, None, dtype=torch.bfloat16, device=self._device)
        tokens = torch.arange(_PROBE[1])[None] % written.config["vocab_size"]
        with torch.no_grad():
            text = model(tokens.to(self._device))[0].float().cpu().contiguous()
        del model
        save_file({"tokens": tokens, "text": text}, self._work / "text.safetensors")
        self._text_encoder = {
            "folder": str(place.resolve()),
            "expected": str((self._work / "text.safetensors").resolve()),
            "bound": _BOUND_BF16,
        }

    def result(self) -> SelfCheck:
        """Runs the checks. Raises ExportError with every key and bound that fails."""
        save_file(self._expected, self._work / "expected.safetensors")
        save_file(dict(self._adapter.tensors), self._work / "trained.safetensors")
        family, layers = self._family, self._layers
        job = {
            "transformer": family.denoiser_class.__name__,
            "pipeline": family.pipeline_class.__name__,
            "components": [*family.text_components, "vae", "scheduler"],
            "config": plain_config(family.denoiser_config),
            "originals": [original.name for original in family.original_names()],
            "files": self._files,
            "layers": {path: layer.scale for path, layer in layers.items()},
            "present": self._present(),
            "dora": self._adapter.is_dora,
            "bases": self._bases,
            "expected": str((self._work / "expected.safetensors").resolve()),
            "trained": str((self._work / "trained.safetensors").resolve()),
        }
        answers = [self._run(_PROGRAM, job)]
        if self._text_encoder is not None:
            answers.append(self._run(_TEXT_PROGRAM, self._text_encoder))
        failures = [failure for answer in answers for failure in answer["failures"]]
        if failures:
            raise ExportError("export: the self-check failed:\n  " + "\n  ".join(failures))
        checked = [line for answer in answers for line in answer["checked"]]
        return SelfCheck(
            (*self._checked, *checked),
            tuple(self._left_out),
            tuple(answers[0]["unread"]),
            float(answers[0]["moved"]),
        )

    def _present(self) -> dict[str, str]:
        """Adapted layer -> its name in the part that is compared, as far as it is there."""
        named = ((path, self._kept.name(path, self._every)) for path in self._layers)
        return {path: own for path, own in named if own is not None}

    def _predict(self, name: str, folder: Path, recipe: QuantRecipe | None, *, adapted: bool) -> None:
        """Adds our own predictions over the weights in a folder, in fp32."""
        recipe = None if recipe is None else replace(recipe, compute_dtype=torch.float32)
        cls = self._family.denoiser_class
        model = load_quantized(cls, folder, recipe, dtype=torch.float32, device=self._device)
        self._expected[f"{name}.bare"] = _prediction(model, self._inputs, self._device)
        if adapted:
            layers = {own: self._layers[path] for path, own in self._present().items()}
            _adapt(model, layers, dora=self._adapter.is_dora)
            self._expected[f"{name}.adapted"] = _prediction(model, self._inputs, self._device)

    def _add(
        self,
        name: str,
        folder: Path,
        expected: str,
        *,
        kinds: list[str],
        bf16: bool = False,
    ) -> None:
        """A base for stock diffusers; `expected` names our predictions, `kinds` the files that go on it."""
        bound = _BOUND_BF16 if bf16 else _BOUNDS[name]
        self._bases.append(
            {
                "name": name,
                "folder": str(folder.resolve()),
                "expected": expected,
                "kinds": kinds,
                "dtype": "bfloat16" if bf16 else "float32",
                "bound": bound,
                "noise": bound if bf16 or name == "int8" else _NOISE,
            }
        )

    def _has_bitsandbytes(self) -> bool:
        if importlib.util.find_spec("bitsandbytes") is not None:
            return True
        lacking = "loading what is quantized, for which stock diffusers needs bitsandbytes"
        if lacking not in self._left_out:
            self._left_out.append(lacking)
        return False

    def _run(self, program: Path, job: Mapping[str, Any]) -> dict[str, Any]:
        answer = self._work / f"{program.stem}.answer.json"
        file = self._work / f"{program.stem}.job.json"
        write_file(file, json.dumps({**job, "device": self._device.type, "answer": str(answer.resolve())}))
        return _answer(program, file, answer)


def _as_trained(denoiser: nn.Module, layers: Mapping[str, LoraLayer]) -> dict[str, LoraLayer]:
    """With the scales that the adapters on the denoiser trained with, where they are on it."""
    modules = dict(denoiser.named_modules())
    found = {}
    for path, layer in layers.items():
        scaling = getattr(modules.get(path), "scaling", {})
        found[path] = replace(layer, scale=float(scaling[ADAPTER])) if ADAPTER in scaling else layer
    return found


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


def _answer(program: Path, job: Path, answer_file: Path) -> dict[str, Any]:
    # -P: the program's own folder has names in it that must not hide other packages.
    command = [sys.executable, "-P", str(program), str(job)]
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
    answer: dict[str, Any] = json.loads(answer_file.read_text(encoding="utf-8"))
    return answer

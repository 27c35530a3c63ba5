"""Checks an export before it is put in place: stock diffusers loads it and must give the same predictions.

Our predictions come from our own layers with the same weights in fp32, where both sides agree to rounding.
Stock diffusers also loads the export in bf16, with a wider bound. The files of an exported model must be
bitwise identical to the model in memory. Of a large model, only one block of each kind and the layers outside
the blocks are loaded and compared, so 24 GB of FLUX need 3 GB. Names, ranks and scales are always checked on
the complete model. The programs that run in the fresh process are `stock/check_transformer.py` and
`stock/check_text_encoder.py`.
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
# Bounds of the relative error of a prediction in fp32. bitsandbytes dequantizes to the dtype that the weight
# had before quantization, and it converts int8's inputs to fp16.
_BOUNDS = {"plain": 1e-3, "nf4": 1e-2, "fp4": 1e-2, "int8": 5e-2}
# The bound if stock diffusers computes in bf16: each product is off by up to 0.4 %, which adds up over a few
# blocks.
_BOUND_BF16 = 1e-1
# Rounding noise of an fp32 prediction, relative to its size. The adapter's effect is a difference of two
# predictions.
_NOISE = 1e-5
_PROBE = (8, 24)  # side of the latent in latent pixels, number of text tokens


@dataclass(frozen=True)
class SelfCheck:
    """The results of an export's self-check."""

    checked: tuple[str, ...]  # the checks that passed
    left_out: tuple[str, ...]  # the checks that were not possible
    unread: tuple[str, ...]  # layers that stock diffusers does not read in a format
    moved: float  # effect of the adapter on the prediction, relative to the prediction


class StockCheck:
    """Collects the parts of an export, then has stock diffusers and transformers load and check all of them."""

    def __init__(self, family: Family, denoiser: nn.Module, adapter: SavedAdapter, work: Path) -> None:
        """Prepares the check of `adapter`.

        `denoiser` is the base, with or without adapters. `work` is an empty folder for the files that the
        other process reads.
        """
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
            self._left_out.append(f"predictions of blocks other than {', '.join(self._kept.blocks)}")

    def add_adapter(
        self, denoiser: nn.Module, folder: Path, formats: Sequence[LoraFormat], *, name: str
    ) -> None:
        """Adds the adapter's files in `folder`, to be compared on the current base of `denoiser`."""
        # The file for diffusers is always exported, and a push uploads it.
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
        """Adds a model exported to `folder`. With `adapted`, it is compared with the adapter on it.

        Raises:
            ExportError: The files differ from `denoiser`.
        """
        check_written_denoiser(folder, denoiser)
        self._checked.append(f"{name}/: every tensor and setting is identical to the model in memory")
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
        """Adds a T5 exported to `folder`.

        Raises:
            ExportError: The files differ from the model in memory.
        """
        check_written(folder, written.tensors, written.config, TEXT_WEIGHTS_FILE)
        self._checked.append("T5: every tensor and setting is identical to the model in memory")
        if not self._has_bitsandbytes():
            return
        place = folder.resolve()
        if is_large(written.tensors):
            place = self._work / "text_encoder"
            place.mkdir()
            write_first_block(written, place)
            self._left_out.append("the encoding of T5's blocks other than the first")
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
        """Runs the checks.

        Raises:
            ExportError: A check failed. The message lists every wrong key and every exceeded bound.
        """
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
        """Maps each adapted layer in the compared part to its name there."""
        named = ((path, self._kept.name(path, self._every)) for path in self._layers)
        return {path: own for path, own in named if own is not None}

    def _predict(self, name: str, folder: Path, recipe: QuantRecipe | None, *, adapted: bool) -> None:
        """Computes our own predictions with the weights of a folder in fp32, and stores them under `name`."""
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
        """Adds a base for stock diffusers to load.

        `expected` names our predictions, `kinds` the adapter files to load onto the base.
        """
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
        missing = (
            "loading quantized models, because bitsandbytes is not installed and stock diffusers needs it"
        )
        if missing not in self._left_out:
            self._left_out.append(missing)
        return False

    def _run(self, program: Path, job: Mapping[str, Any]) -> dict[str, Any]:
        answer = self._work / f"{program.stem}.answer.json"
        file = self._work / f"{program.stem}.job.json"
        write_file(file, json.dumps({**job, "device": self._device.type, "answer": str(answer.resolve())}))
        return _answer(program, file, answer)


def _as_trained(denoiser: nn.Module, layers: Mapping[str, LoraLayer]) -> dict[str, LoraLayer]:
    """Returns the layers with the scales from training, which the adapters on the denoiser have, if there are any."""
    modules = dict(denoiser.named_modules())
    found = {}
    for path, layer in layers.items():
        scaling = getattr(modules.get(path), "scaling", {})
        found[path] = replace(layer, scale=float(scaling[ADAPTER])) if ADAPTER in scaling else layer
    return found


def _inputs(family: Family) -> dict[str, Tensor]:
    """Returns the keyword arguments with which the family calls the denoiser for a small fixed input."""
    side, tokens = _PROBE
    config, draws = family.denoiser_config, torch.Generator().manual_seed(0)
    noisy = torch.randn(1, family.vae_config["latent_channels"], side, side, generator=draws)
    text = TextEmbedding(
        torch.randn(1, tokens, config["joint_attention_dim"], generator=draws),
        torch.randn(1, config["pooled_projection_dim"], generator=draws),
    )
    recorder = _InputRecorder()
    family.predict(recorder, noisy, torch.tensor([0.5]), text, 1.0)
    return {key: tensor.contiguous() for key, tensor in recorder.inputs.items() if isinstance(tensor, Tensor)}


class _InputRecorder(nn.Module):
    """Takes the place of the denoiser and records its inputs."""

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
    """Adds our own adapted layers with these weights to the model."""
    config = LoraConfig(
        r=1,
        lora_alpha=1,
        target_modules=list(layers),
        # PEFT matches a pattern against the end of a name. The ^ makes it match only the full name.
        rank_pattern={f"^{path}": layer.rank for path, layer in layers.items()},
        alpha_pattern={f"^{path}": layer.scale * layer.rank for path, layer in layers.items()},
        use_dora=dora,
    )
    model.add_adapter(fused_config(config), adapter_name="check")
    for path, layer in layers.items():
        module = model.get_submodule(path)
        values = {"lora_A": layer.down, "lora_B": layer.up}
        if layer.magnitude is not None:
            values["lora_magnitude_vector"] = layer.magnitude
        for kind, value in values.items():
            parameter = getattr(module, kind)["check"].weight
            parameter.data = value.to(parameter.device, torch.float32)


def _answer(program: Path, job: Path, answer_file: Path) -> dict[str, Any]:
    # -P keeps the program's folder off sys.path, so its files cannot shadow other packages.
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
        raise ExportError(f"export: the self-check was stopped after {_TIMEOUT} s") from error
    if done.returncode != 0:
        last = "\n  ".join(done.stderr.strip().splitlines()[-8:])
        raise ExportError(
            "export: stock diffusers could not load the export; nothing was exported, and the checkpoints are complete"
            f" (to export without the check: halfbyte export RUN --no-self-check):\n  {last}"
        )
    answer: dict[str, Any] = json.loads(answer_file.read_text(encoding="utf-8"))
    return answer

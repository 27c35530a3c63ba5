"""Checks that stock diffusers loads an export. Runs as a separate program that imports nothing of halfbyte.

    python -P check_transformer.py JOB.json

The job names the exported files and holds the predictions of our layers. The result goes into the job's
`answer` file as JSON: the checks that passed and the checks that failed. Each adapter is loaded twice. The
first load, onto the complete transformer without weights (on meta), checks every name, rank and scale. The
second load, onto each base in the job with its weights, compares the predictions.
"""

import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from peft import PeftModel
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import load_file
from torch import Tensor, nn

_FLUX_WIDTH = 3072  # the layer width that diffusers hard-codes in its conversion of FLUX's fused layers
_SHOWN = 5
_PEFT_PREFIX = "base_model.model."

# The errors that diffusers and PEFT raise for files in an unexpected format.
_LOADING = (LookupError, ValueError, RuntimeError, OSError, AssertionError, AttributeError, TypeError)

Scaled = dict[str, tuple[Tensor, Tensor, float, Tensor | None]]
"""Maps a layer to A (rank, in), B (out, rank), the scale, and DoRA's magnitude (out,) or None."""


class Failed(Exception):
    """A check of the export failed."""


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    answer: dict[str, Any] = {"failures": [], "checked": [], "unread": [], "moved": 0.0}
    adapters = {}
    for kind, file in job["files"].items():
        try:
            adapters[kind], unread = loaded_whole(job, kind, Path(file))
        except Failed as failure:
            answer["failures"].append(f"{kind}: {failure}")
        except _LOADING as error:
            answer["failures"].append(
                f"{kind}: stock diffusers cannot load it: {type(error).__name__}: {error}"
            )
        else:
            report_loaded(answer, kind, len(adapters[kind]), unread)
    expected = load_file(job["expected"])
    for base in job["bases"]:
        try:
            compare_on(job, base, adapters, expected, answer)
        except Failed as failure:
            answer["failures"].append(f"the {base['name']} base: {failure}")
        except _LOADING as error:
            answer["failures"].append(
                f"the {base['name']} base: stock diffusers cannot load it: {type(error).__name__}: {error}"
            )
    ours = sorted(name for name in sys.modules if name.partition(".")[0] == "halfbyte")
    if ours:
        answer["failures"].append(f"the check imported {ours[0]} of halfbyte, so its result is not valid")
    Path(job["answer"]).write_text(json.dumps(answer), encoding="utf-8")


def report_loaded(answer: dict[str, Any], kind: str, count: int, unread: list[str]) -> None:
    """Adds the number of layers with an adapter to the answer, and the layers that load_lora_weights does not read."""
    if len(unread) < count:
        answer["checked"].append(f"{kind}: {count - len(unread)} layers by name, rank and scale")
    if unread and len(unread) == count:
        answer["unread"].append(
            f"{kind}: stock diffusers' load_lora_weights reads no layer of this model in this format, which is meant"
            f" for other programs; all {count} layers were compared under the names from diffusers' conversion"
        )
    elif unread:
        names = ", ".join(unread[:_SHOWN]) + (", ..." if len(unread) > _SHOWN else "")
        answer["unread"].append(
            f"{kind}: stock diffusers' load_lora_weights does not read {len(unread)} of {count} layers in this format:"
            f" {names}; they were compared under the names from diffusers' conversion"
        )


def compare_on(
    job: dict[str, Any],
    base: dict[str, Any],
    adapters: dict[str, Scaled],
    expected: dict[str, Tensor],
    answer: dict[str, Any],
) -> None:
    """Compares the predictions on a base with ours, without and with each adapter.

    Adds the result to the answer.
    """
    inputs = {name.removeprefix("input."): t for name, t in expected.items() if name.startswith("input.")}
    model, quantized = stock_model(job, base)
    dtype = getattr(torch, base["dtype"])
    bare = predict(model, inputs, job["device"], dtype)
    own_bare = expected[f"{base['expected']}.bare"]
    note = " (on the CPU, without diffusers' GPU check)" if quantized and job["device"] == "cpu" else ""
    error, bound = distance(bare, own_bare), base["bound"]
    if not error <= bound:
        raise Failed(f"the prediction without an adapter differs by {error:.2g} from ours, bound {bound:g}")
    if not base["kinds"]:
        answer["checked"].append(
            f"{base['name']}: loaded by stock diffusers; its prediction{note} differs by {error:.1g} from ours, bound"
            f" {bound:g}"
        )
    for kind in base["kinds"]:
        if kind not in adapters:
            continue
        adapted = predict(with_adapter(job, model, adapters[kind]), inputs, job["device"], dtype)
        own_adapted = expected[f"{base['expected']}.adapted"]
        problems, moved = compared(bare, adapted, own_bare, own_adapted, base)
        answer["failures"] += [f"{kind} on the {base['name']} base: {problem}" for problem in problems]
        if not problems:
            largest = max(error, distance(adapted, own_adapted))
            answer["checked"].append(
                f"{kind}: prediction on the {base['name']} base{note} differs by {largest:.1g} from ours, bound"
                f" {bound:g}"
            )
        answer["moved"] = max(answer["moved"], moved if base["dtype"] == "float32" else 0.0)
        model.delete_adapters("check")


def pipeline_of(job: dict[str, Any], transformer: nn.Module) -> Any:
    """Builds the stock pipeline with only a transformer."""
    parts = dict.fromkeys(job["components"])
    return getattr(diffusers, job["pipeline"])(**parts | {"transformer": transformer})


def loaded_whole(job: dict[str, Any], kind: str, file: Path) -> tuple[Scaled, list[str]]:
    """Loads an adapter onto the complete transformer with stock code and compares it with the trained one.

    Returns the adapter, and the layers that `load_lora_weights` would ignore because diffusers' conversion
    drops their prefix.
    """
    cls = getattr(diffusers, job["transformer"])
    with init_empty_weights():
        model = cls.from_config(job["config"])
    unread: list[str] = []
    if kind == "peft":
        PeftModel.from_pretrained(model, str(file.parent), adapter_name="check")
        weights = load_peft_weights(str(file.parent), device="cpu")
        state = {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in weights.items()}
    elif kind == "diffusers":
        pipeline = pipeline_of(job, model)
        state = pipeline.lora_state_dict(str(file.parent))
        state = state[0] if isinstance(state, tuple) else state
        pipeline.load_lora_weights(str(file.parent), adapter_name="check")
    else:
        state = trained_parts(job, converted(job, file))
        bare = [name for name in state if not name.startswith("transformer.")]
        unread = sorted({name.partition(".lora_")[0] for name in bare})
        pipeline_of(job, model).load_lora_weights(
            {with_prefix(n): t for n, t in state.items()}, adapter_name="check"
        )
    count(job, state)
    found: Scaled = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "check" in module.lora_A:
            down, up = (state[key] for key in stored_names(name, state))
            loaded = (module.lora_A["check"].weight, module.lora_B["check"].weight)
            # Compare only shapes: PEFT puts an adapter on the device of its base, which is meta.
            if any(layer.shape != stored.shape for layer, stored in zip(loaded, (down, up), strict=True)):
                raise Failed(f"{name}: the loaded tensors have other shapes than the tensors in the file")
            key = f"{name}.lora_magnitude_vector"
            magnitude = state.get(key, state.get(f"transformer.{key}"))
            found[name] = (down, up, float(module.scaling["check"]), magnitude)
    check_layers(job, found)
    return found, unread


def with_prefix(name: str) -> str:
    return name if name.startswith("transformer.") else f"transformer.{name}"


def trained_parts(job: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Removes the untrained parts of fused layers.

    They are zeros, and diffusers' conversion turns them into layers.
    """
    zeros = {
        name.partition(".lora_B.")[0] for name, up in state.items() if ".lora_B." in name and not up.any()
    }
    untrained = {layer for layer in zeros if layer.removeprefix("transformer.") not in job["layers"]}
    return {name: tensor for name, tensor in state.items() if name.partition(".lora_")[0] not in untrained}


def stored_names(layer: str, state: dict[str, Tensor]) -> list[str]:
    keys = [f"{layer}.lora_{side}.weight" for side in "AB"]
    return [key if key in state else f"transformer.{key}" for key in keys]


def count(job: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Checks that the keys are exactly those of the trained layers. Raises Failed, naming the keys."""
    endings = ["lora_A.weight", "lora_B.weight", *(["lora_magnitude_vector"] if job["dora"] else [])]
    wanted = {f"{layer}.{ending}" for layer in job["layers"] for ending in endings}
    found = {name.removeprefix("transformer.") for name in state}
    for names, problem in ((wanted - found, "missing"), (found - wanted, "unexpected")):
        if names:
            listed = ", ".join(sorted(names)[:_SHOWN])
            raise Failed(f"{len(names)} keys {problem}: {listed}{', ...' if len(names) > _SHOWN else ''}")


def check_layers(job: dict[str, Any], found: Scaled) -> None:
    """Checks that every layer has the update that was trained. Raises Failed."""
    missing = sorted(job["layers"].keys() - found.keys())
    if missing:
        raise Failed(f"{len(missing)} layers have no adapter after loading, first {missing[0]}")
    trained = load_file(job["trained"])
    draws = torch.Generator().manual_seed(0)
    for name, (down, up, scale, _) in found.items():
        own_down, own_up = (trained[f"{name}.lora_{side}.weight"] for side in "AB")
        if (down.shape[1], up.shape[0]) != (own_down.shape[1], own_up.shape[0]):
            raise Failed(
                f"{name}: the file has a B of shape {tuple(up.shape)} and an A of shape {tuple(down.shape)}; expected"
                f" {own_up.shape[0]} outputs and {own_down.shape[1]} inputs"
            )
        # The ranks may differ, but the updates must agree. Compare their products with a random matrix.
        probe = torch.randn(down.shape[1], 4, generator=draws)
        theirs = scale * (up.float() @ (down.float() @ probe))
        ours = job["layers"][name] * (own_up @ (own_down @ probe))
        if (theirs - ours).norm() > 1e-4 * ours.norm():
            raise Failed(f"{name}: its update differs from the trained one, scale {scale:g}")


def converted(job: dict[str, Any], file: Path) -> dict[str, Tensor]:
    """Converts the file with diffusers' own code to its layer names."""
    tensors = load_file(file)
    if job["transformer"] == "SD3Transformer2DModel":
        return converted_sd3(job, tensors)
    width = job["config"]["num_attention_heads"] * job["config"]["attention_head_dim"]
    for name in tensors:
        if width != _FLUX_WIDTH and "linear1.lora_up" in name:
            tensors[name] = padded(tensors[name], width)
    state = getattr(diffusers, job["pipeline"]).lora_state_dict(tensors)
    state = state[0] if isinstance(state, tuple) else state
    if width == _FLUX_WIDTH:
        return dict(state)
    rows = {"attn.to_q": width, "attn.to_k": width, "attn.to_v": width, "proj_mlp": 4 * width}
    return {name: unpadded(name, tensor, rows) for name, tensor in state.items()}


def padded(up: Tensor, width: int) -> Tensor:
    """Pads the rows of a small model's q, k, v and MLP with zeros to the sizes of the full model.

    diffusers' conversion splits fused layers at the full model's sizes only.
    """
    parts = up.split((width, width, width, 4 * width))
    sizes = (_FLUX_WIDTH,) * 3 + (4 * _FLUX_WIDTH,)
    return torch.cat(
        [
            torch.cat((part, part.new_zeros(size - len(part), part.shape[1])))
            for part, size in zip(parts, sizes, strict=True)
        ]
    )


def unpadded(name: str, tensor: Tensor, rows: dict[str, int]) -> Tensor:
    """Removes the rows that `padded` added, after the conversion."""
    for layer, height in rows.items():
        if "single_transformer_blocks" in name and name.endswith(f"{layer}.lora_B.weight"):
            return tensor[:height].contiguous()
    return tensor


class _Checkpoint(dict[str, Tensor]):
    """A checkpoint that returns NaN for the weights that an adapter does not have."""

    def pop(self, name: str, *default: Any) -> Tensor:
        return super().pop(name, torch.full((6, 1), torch.nan))


def converted_sd3(job: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts an SD3 adapter with diffusers' conversion of SD3 checkpoints.

    diffusers has no conversion for SD3 LoRA. Each scaled B stands in for the layer's weight, so its rows are
    split like the weight's rows. An additional last column holds the index of the A that belongs to the rows.
    """
    names = {}
    for part in job["originals"]:
        for key in (f"diffusion_model.{part}", "lora_unet_" + part.replace(".", "_")):
            names[key] = part
    checkpoint = _Checkpoint()
    downs: list[Tensor] = []
    for key in sorted(name.removesuffix(".lora_up.weight") for name in tensors if ".lora_up." in name):
        if key not in names:
            raise Failed(f"1 keys unexpected: {key}.lora_up.weight")
        up, down = tensors.pop(f"{key}.lora_up.weight"), tensors.pop(f"{key}.lora_down.weight")
        scale = float(tensors.pop(f"{key}.alpha")) / len(down)
        checkpoint[f"{names[key]}.weight"] = torch.cat(
            (up * scale, torch.full((len(up), 1), float(len(downs)))), 1
        )
        downs.append(down)
    if tensors:
        raise Failed(f"{len(tensors)} keys unexpected: {', '.join(sorted(tensors)[:_SHOWN])}")
    last = f"joint_blocks.{job['config']['num_layers'] - 1}.x_block.attn.qkv.weight"
    for name in (last, "context_embedder.weight"):
        checkpoint.setdefault(name, torch.full((6, 1), torch.nan))
    state = {}
    for name, weight in convert_sd3_transformer_checkpoint_to_diffusers(checkpoint).items():
        if not weight.isnan().any():
            layer = name.removesuffix(".weight")
            state[f"{layer}.lora_A.weight"] = downs[int(weight[0, -1])]
            state[f"{layer}.lora_B.weight"] = weight[:, :-1].contiguous()
    left = [name for name, weight in checkpoint.items() if not weight.isnan().any()]
    if left:
        raise Failed(f"{len(left)} keys unexpected: {', '.join(left[:_SHOWN])}")
    return state


def stock_model(job: dict[str, Any], base: dict[str, Any]) -> tuple[Any, bool]:
    """Loads a base with its weights by stock `from_pretrained`. Returns it, and True if it is quantized."""
    cls = getattr(diffusers, job["transformer"])
    quantized = "quantization_config" in cls.load_config(base["folder"])
    if quantized and job["device"] == "cpu":
        allow_cpu()
    model, info = cls.from_pretrained(
        base["folder"], torch_dtype=getattr(torch, base["dtype"]), output_loading_info=True
    )
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise Failed(
            f"{len(wrong)} keys are missing, unexpected or of the wrong shape: {', '.join(map(str, wrong[:_SHOWN]))}"
        )
    if not quantized:
        model.to(job["device"])
    kinds = {type(module).__module__.partition(".")[0] for module in model.modules()}
    if quantized and "bitsandbytes" not in kinds:
        raise Failed("no layer is a bitsandbytes layer")
    # In eval mode, bitsandbytes repacks weights in place on some CPUs and rounds differently.
    return model.train(), quantized


def allow_cpu() -> None:
    """Turns off the check with which diffusers rejects bitsandbytes on a CPU.

    bitsandbytes itself works there.
    """
    for name, stock in list(AUTO_QUANTIZER_MAPPING.items()):
        if name.startswith("bitsandbytes"):
            AUTO_QUANTIZER_MAPPING[name] = type(
                stock.__name__,
                (stock,),
                {
                    "validate_environment": lambda self, *args, **kwargs: None,
                    "update_device_map": lambda self, device_map: {"": "cpu"},
                },
            )


def with_adapter(job: dict[str, Any], model: Any, layers: Scaled) -> Any:
    """Loads the adapter's layers that the model has onto the model, by stock `load_lora_adapter`."""
    state: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    for name, own in job["present"].items():
        down, up, scale, magnitude = layers[name]
        state[f"transformer.{own}.lora_A.weight"] = down
        state[f"transformer.{own}.lora_B.weight"] = up
        if magnitude is not None:
            state[f"transformer.{own}.lora_magnitude_vector"] = magnitude
        ranks[f"^{own}"], alphas[f"^{own}"] = len(down), scale * len(down)
    config = {"r": 1, "lora_alpha": 1, "rank_pattern": ranks, "alpha_pattern": alphas, "lora_bias": False}
    config |= {"target_modules": list(job["present"].values()), "use_dora": job["dora"]}
    model.load_lora_adapter(
        state,
        prefix="transformer",
        adapter_name="check",
        metadata={f"transformer.{k}": v for k, v in config.items()},
    )
    return model


@torch.no_grad()
def predict(model: Any, inputs: dict[str, Tensor], device: str, dtype: torch.dtype) -> Tensor:
    # Pass all inputs in one dtype, as the pipelines do.
    tensors = {name: tensor.to(device, dtype) for name, tensor in inputs.items()}
    return model(**tensors, return_dict=False)[0].float().cpu()


def distance(theirs: Tensor, ours: Tensor) -> float:
    return float((theirs - ours).norm() / ours.norm())


def compared(
    bare: Tensor, adapted: Tensor, own_bare: Tensor, own_adapted: Tensor, base: dict[str, Any]
) -> tuple[list[str], float]:
    """Compares an adapted prediction with ours.

    Returns the problems, and the size of the adapter's effect relative to the prediction.
    """
    problems = []
    difference, bound = distance(adapted, own_adapted), base["bound"]
    if not difference <= bound:
        problems.append(
            f"the prediction with the adapter differs by {difference:.2g} from ours, bound {bound:g}"
        )
    effect, own_effect = adapted - bare, own_adapted - own_bare
    moved, size = float(own_effect.norm()), float(own_bare.norm())
    error = float((effect - own_effect).norm())
    # The effect is a difference of two predictions, so it is exact only down to their rounding noise: both
    # sides add in a different order.
    if not error <= 0.05 * moved + base["noise"] * size:
        problems.append(
            f"the adapter's effect differs by {error / max(moved, 1e-30):.2g} from the effect after training"
        )
    return problems, moved / size


if __name__ == "__main__":
    main(sys.argv[1])

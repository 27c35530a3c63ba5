"""Whether stock diffusers takes an export: run as a program of its own, in which nothing of ours is imported.

    python -P stock_check.py JOB.json

The job says what was exported and what our layers predict; the answer goes to its `answer` file as JSON: what was
checked, and what failed. Adapters are loaded twice. On the whole transformer without weights (on meta) every name,
rank and scale is counted; on the bases that the job brings along, with their weights, the prediction is compared.
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

_FLUX_WIDTH = 3072  # which diffusers' conversion of FLUX's fused layers has in its code
_SHOWN = 5
_PEFT_PREFIX = "base_model.model."

# What diffusers and PEFT raise over files that are not as they expect.
_LOADING = (LookupError, ValueError, RuntimeError, OSError, AssertionError, AttributeError, TypeError)

Scaled = dict[str, tuple[Tensor, Tensor, float, Tensor | None]]
"""Layer -> A, B, scale, and DoRA's lengths of rows."""


class Failed(Exception):
    """Something of the export is not as it should be."""


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
            tell_whole(answer, kind, len(adapters[kind]), unread)
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
        answer["failures"].append(f"the check itself imported {ours[0]}, and proves nothing")
    Path(job["answer"]).write_text(json.dumps(answer), encoding="utf-8")


def tell_whole(answer: dict[str, Any], kind: str, count: int, unread: list[str]) -> None:
    """Notes how many layers stock loading puts an adapter on; those that it does not are told apart."""
    if len(unread) < count:
        answer["checked"].append(f"{kind}: {count - len(unread)} layers by name, rank and scale")
    if unread and len(unread) == count:
        answer["unread"].append(
            f"{kind}: of this model stock diffusers' load_lora_weights reads no layer in this format, which is for"
            f" other programs; all {count} are compared by the names that its conversion gives them"
        )
    elif unread:
        shown = ", ".join(unread[:_SHOWN]) + (", ..." if len(unread) > _SHOWN else "")
        answer["unread"].append(
            f"{kind}: stock diffusers' load_lora_weights does not read {len(unread)} of {count} layers of this format:"
            f" {shown}; they are compared by the names that its conversion gives them"
        )


def compare_on(
    job: dict[str, Any],
    base: dict[str, Any],
    adapters: dict[str, Scaled],
    expected: dict[str, Tensor],
    answer: dict[str, Any],
) -> None:
    """Adds to the answer how the predictions on a base compare with ours, without and with each adapter."""
    inputs = {name.removeprefix("input."): t for name, t in expected.items() if name.startswith("input.")}
    model, quantized = stock_model(job, base)
    dtype = getattr(torch, base["dtype"])
    bare = predict(model, inputs, job["device"], dtype)
    own_bare = expected[f"{base['expected']}.bare"]
    # diffusers refuses bitsandbytes without a GPU, by a check alone, which is passed over here.
    note = " (on the CPU, past diffusers' refusal)" if quantized and job["device"] == "cpu" else ""
    apart, bound = distance(bare, own_bare), base["bound"]
    if not apart <= bound:
        raise Failed(f"the prediction without an adapter differs by {apart:.2g} from ours, bound {bound:g}")
    if not base["kinds"]:
        answer["checked"].append(
            f"{base['name']}: loaded by stock diffusers; prediction{note} {apart:.1g} from ours, bound {bound:g}"
        )
    for kind in base["kinds"]:
        if kind not in adapters:
            continue
        adapted = predict(with_adapter(job, model, adapters[kind]), inputs, job["device"], dtype)
        own_adapted = expected[f"{base['expected']}.adapted"]
        problems, moved = compared(bare, adapted, own_bare, own_adapted, base)
        answer["failures"] += [f"{kind} on the {base['name']} base: {problem}" for problem in problems]
        if not problems:
            largest = max(apart, distance(adapted, own_adapted))
            answer["checked"].append(
                f"{kind}: prediction on the {base['name']} base{note}: {largest:.1g} from ours, bound {bound:g}"
            )
        answer["moved"] = max(answer["moved"], moved if base["dtype"] == "float32" else 0.0)
        model.delete_adapters("check")


def pipeline_of(job: dict[str, Any], transformer: nn.Module) -> Any:
    """The stock pipeline with nothing but a transformer."""
    parts = dict.fromkeys(job["components"])
    return getattr(diffusers, job["pipeline"])(**parts | {"transformer": transformer})


def loaded_whole(job: dict[str, Any], kind: str, file: Path) -> tuple[Scaled, list[str]]:
    """The adapter as stock loading puts it on the whole transformer, counted against what was trained.

    Beside it the layers that `load_lora_weights` would leave out, since diffusers' conversion forgets their prefix.
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
            # Shapes: PEFT puts an adapter where its base is, which is on meta.
            if any(layer.shape != held.shape for layer, held in zip(loaded, (down, up), strict=True)):
                raise Failed(f"{name}: what was loaded has not the shapes that the file holds")
            magnitude = f"{name}.lora_magnitude_vector"
            lengths = state.get(magnitude, state.get(f"transformer.{magnitude}"))
            found[name] = (down, up, float(module.scaling["check"]), lengths)
    check_layers(job, found)
    return found, unread


def with_prefix(name: str) -> str:
    return name if name.startswith("transformer.") else f"transformer.{name}"


def trained_parts(job: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the parts of fused layers that were not trained: zeros, which conversion makes layers of."""
    zeros = {
        name.partition(".lora_B.")[0] for name, up in state.items() if ".lora_B." in name and not up.any()
    }
    untrained = {layer for layer in zeros if layer.removeprefix("transformer.") not in job["layers"]}
    return {name: tensor for name, tensor in state.items() if name.partition(".lora_")[0] not in untrained}


def stored_names(layer: str, state: dict[str, Tensor]) -> list[str]:
    keys = [f"{layer}.lora_{side}.weight" for side in "AB"]
    return [key if key in state else f"transformer.{key}" for key in keys]


def count(job: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Raises Failed, naming the keys, where they are those of the trained layers."""
    endings = ["lora_A.weight", "lora_B.weight", *(["lora_magnitude_vector"] if job["dora"] else [])]
    wanted = {f"{layer}.{ending}" for layer in job["layers"] for ending in endings}
    found = {name.removeprefix("transformer.") for name in state}
    for names, what in ((wanted - found, "missing"), (found - wanted, "left over")):
        if names:
            shown = ", ".join(sorted(names)[:_SHOWN])
            raise Failed(f"{len(names)} keys {what}: {shown}{', ...' if len(names) > _SHOWN else ''}")


def check_layers(job: dict[str, Any], found: Scaled) -> None:
    """Raises Failed where a layer's update is not the one that was trained."""
    missing = sorted(job["layers"].keys() - found.keys())
    if missing:
        raise Failed(f"{len(missing)} layers have no adapter after loading, first {missing[0]}")
    trained = load_file(job["trained"])
    draws = torch.Generator().manual_seed(0)
    for name, (down, up, scale, _) in found.items():
        own_down, own_up = (trained[f"{name}.lora_{side}.weight"] for side in "AB")
        if (down.shape[1], up.shape[0]) != (own_down.shape[1], own_up.shape[0]):
            raise Failed(f"{name}: the file has {tuple(up.shape)} by {tuple(down.shape)}")
        # The ranks may differ, the update may not: compared through the columns of a random matrix.
        probe = torch.randn(down.shape[1], 4, generator=draws)
        theirs = scale * (up.float() @ (down.float() @ probe))
        ours = job["layers"][name] * (own_up @ (own_down @ probe))
        if (theirs - ours).norm() > 1e-4 * ours.norm():
            raise Failed(f"{name}: its update differs from the trained one, scale {scale:g}")


def converted(job: dict[str, Any], file: Path) -> dict[str, Tensor]:
    """The file by diffusers' own conversion, in its names."""
    tensors = load_file(file)
    if job["transformer"] == "SD3Transformer2DModel":
        return converted_sd3(job, tensors)
    width = job["config"]["num_attention_heads"] * job["config"]["attention_head_dim"]
    for name in tensors:
        if width != _FLUX_WIDTH and "linear1.lora_up" in name:
            tensors[name] = grown(tensors[name], width)
    state = getattr(diffusers, job["pipeline"]).lora_state_dict(tensors)
    state = state[0] if isinstance(state, tuple) else state
    if width == _FLUX_WIDTH:
        return dict(state)
    rows = {"attn.to_q": width, "attn.to_k": width, "attn.to_v": width, "proj_mlp": 4 * width}
    return {name: cut(name, tensor, rows) for name, tensor in state.items()}


def grown(up: Tensor, width: int) -> Tensor:
    """Rows of a small model's q, k, v and MLP, filled up with zeros to the full model's."""
    parts = up.split((width, width, width, 4 * width))
    sizes = (_FLUX_WIDTH,) * 3 + (4 * _FLUX_WIDTH,)
    return torch.cat(
        [
            torch.cat((part, part.new_zeros(size - len(part), part.shape[1])))
            for part, size in zip(parts, sizes, strict=True)
        ]
    )


def cut(name: str, tensor: Tensor, rows: dict[str, int]) -> Tensor:
    for layer, height in rows.items():
        if "single_transformer_blocks" in name and name.endswith(f"{layer}.lora_B.weight"):
            return tensor[:height].contiguous()
    return tensor


class _Checkpoint(dict[str, Tensor]):
    """A checkpoint that answers with NaN for what an adapter does not have."""

    def pop(self, name: str, *default: Any) -> Tensor:
        return super().pop(name, torch.full((6, 1), torch.nan))


def converted_sd3(job: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Through diffusers' conversion of SD3's checkpoints, since it has none for its LoRA: each B goes as a weight.

    Its rows are parted as the weight's are, and a last column with a number says which A belongs to them.
    """
    names = {}
    for part in job["originals"]:
        for key in (f"diffusion_model.{part}", "lora_unet_" + part.replace(".", "_")):
            names[key] = part
    checkpoint = _Checkpoint()
    downs: list[Tensor] = []
    for key in sorted(name.removesuffix(".lora_up.weight") for name in tensors if ".lora_up." in name):
        if key not in names:
            raise Failed(f"1 keys left over: {key}.lora_up.weight")
        up, down = tensors.pop(f"{key}.lora_up.weight"), tensors.pop(f"{key}.lora_down.weight")
        scale = float(tensors.pop(f"{key}.alpha")) / len(down)
        checkpoint[f"{names[key]}.weight"] = torch.cat(
            (up * scale, torch.full((len(up), 1), float(len(downs)))), 1
        )
        downs.append(down)
    if tensors:
        raise Failed(f"{len(tensors)} keys left over: {', '.join(sorted(tensors)[:_SHOWN])}")
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
        raise Failed(f"{len(left)} keys left over: {', '.join(left[:_SHOWN])}")
    return state


def stock_model(job: dict[str, Any], base: dict[str, Any]) -> tuple[Any, bool]:
    """A base with its weights, by stock `from_pretrained`, and whether it is quantized."""
    cls = getattr(diffusers, job["transformer"])
    quantized = "quantization_config" in cls.load_config(base["folder"])
    if quantized and job["device"] == "cpu":
        allow_cpu()
    model, info = cls.from_pretrained(
        base["folder"], torch_dtype=getattr(torch, base["dtype"]), output_loading_info=True
    )
    odd = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if odd:
        raise Failed(f"{len(odd)} keys missing or left over: {', '.join(map(str, odd[:_SHOWN]))}")
    if not quantized:
        model.to(job["device"])
    kinds = {type(module).__module__.partition(".")[0] for module in model.modules()}
    if quantized and "bitsandbytes" not in kinds:
        raise Failed("no layer of it is bitsandbytes' own")
    # In eval mode bitsandbytes repacks weights in place on some CPUs, and rounds otherwise.
    return model.train(), quantized


def allow_cpu() -> None:
    """Stock bitsandbytes without a GPU: diffusers refuses it by a check alone."""
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
    """The model with the adapter, as far as its blocks are here, by stock `load_lora_weights`."""
    state: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    for name, own in job["present"].items():
        down, up, scale, lengths = layers[name]
        state[f"transformer.{own}.lora_A.weight"] = down
        state[f"transformer.{own}.lora_B.weight"] = up
        if lengths is not None:
            state[f"transformer.{own}.lora_magnitude_vector"] = lengths
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
    # The pipelines too give the model everything in one dtype.
    tensors = {name: tensor.to(device, dtype) for name, tensor in inputs.items()}
    return model(**tensors, return_dict=False)[0].float().cpu()


def distance(theirs: Tensor, ours: Tensor) -> float:
    return float((theirs - ours).norm() / ours.norm())


def compared(
    bare: Tensor, adapted: Tensor, own_bare: Tensor, own_adapted: Tensor, base: dict[str, Any]
) -> tuple[list[str], float]:
    """What is wrong with an adapted prediction, and how far the adapter moved it."""
    problems = []
    apart, bound = distance(adapted, own_adapted), base["bound"]
    if not apart <= bound:
        problems.append(f"the prediction with the adapter differs by {apart:.2g} from ours, bound {bound:g}")
    effect, own_effect = adapted - bare, own_adapted - own_bare
    moved, size = float(own_effect.norm()), float(own_bare.norm())
    error = float((effect - own_effect).norm())
    # The order of sums differs, so that an effect is known only down to the noise of what it is a difference of.
    if not error <= 0.05 * moved + base["noise"] * size:
        problems.append(
            f"the adapter's effect differs by {error / max(moved, 1e-30):.2g} from what training left"
        )
    return problems, moved / size


if __name__ == "__main__":
    main(sys.argv[1])

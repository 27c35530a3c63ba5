"""Which linear layers of a model are quantized: the recipe, and diffusers' own rule for what it skips."""

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import nn

from halfbyte.kernels.quantize_4bit import operands
from halfbyte.quant.formats.int8 import DEFAULT_THRESHOLD
from halfbyte.quant.formats.nf4 import WEIGHT_DTYPES, QuantSpec
from halfbyte.quant.layers.linear4bit import Linear4bit
from halfbyte.quant.layers.linear8bit import Linear8bit

log = logging.getLogger(__name__)

QuantizedLinear = Linear4bit | Linear8bit
QUANT_TYPES = (*operands.QUANT_TYPES, "int8")
_USUAL_BLOCKSIZE = 64
_LARGEST_THRESHOLD = 65504.0  # of fp16, in which outliers are told


@dataclass(frozen=True)
class QuantRecipe:
    """How a model is quantized, and which of its layers are not."""

    quant_type: str = "nf4"
    """`nf4`, `fp4` or `int8` (LLM.int8())."""
    double_quant: bool = True
    """Store the block scales in 8 bits as well; always False for int8, which has a scale a row."""
    blocksize: int = _USUAL_BLOCKSIZE
    """Weights that share a scale, in the 4-bit types."""
    compute_dtype: torch.dtype = torch.bfloat16
    """What the products run in: bfloat16, float16 or float32."""
    skip: tuple[str, ...] = ()
    """Modules left alone, as diffusers matches them: the last part of a layer's path, its whole path, or anything
    that stands in the path before a dot."""
    llm_int8_threshold: float = DEFAULT_THRESHOLD
    """int8: input columns that reach this magnitude are multiplied in compute_dtype; 0: none are."""
    scale_search: str | None = None
    """`mse`: 4-bit scales with the least squared error instead of the block's largest magnitude. It leaves no
    trace in the files, and a folder that is quantized already keeps its scales."""

    def __post_init__(self) -> None:
        if self.quant_type not in QUANT_TYPES:
            raise ValueError(f"quant_type: got {self.quant_type!r}, accepted: {', '.join(QUANT_TYPES)}")
        if self.compute_dtype not in WEIGHT_DTYPES:
            raise ValueError(f"compute_dtype: got {self.compute_dtype}, accepted: bfloat16, float16, float32")
        if isinstance(self.skip, str) or not all(isinstance(entry, str) and entry for entry in self.skip):
            raise ValueError(f"skip: got {self.skip!r}, expected a list of module names")
        object.__setattr__(self, "skip", tuple(self.skip))
        if not 0 <= self.llm_int8_threshold <= _LARGEST_THRESHOLD:
            raise ValueError(
                f"llm_int8_threshold: got {self.llm_int8_threshold}, expected a number from 0 to 65504"
            )
        # diffusers refuses a config.json with an integer there.
        object.__setattr__(self, "llm_int8_threshold", float(self.llm_int8_threshold))
        if self.quant_type == "int8":
            if self.scale_search is not None:
                raise ValueError(f"scale_search: got {self.scale_search!r}, expected None for int8")
            # What has no meaning for a type has one value there, so that recipes that mean the same are equal.
            object.__setattr__(self, "double_quant", False)
        else:
            object.__setattr__(self, "llm_int8_threshold", DEFAULT_THRESHOLD)
            QuantSpec(self.quant_type, self.double_quant, self.blocksize, self.scale_search)

    def describe(self) -> str:
        """How the layers are held, in words; what they compute in is not said."""
        text = self.quant_type
        if self.quant_type == "int8" and self.llm_int8_threshold:
            text += f", outliers from {self.llm_int8_threshold:g}"
        if self.double_quant:
            text += " with double quantization"
        if self.blocksize != _USUAL_BLOCKSIZE:
            text += f", blocks of {self.blocksize}"
        if self.scale_search is not None:
            text += f", scales by {self.scale_search}"
        return text + (f", all but {', '.join(self.skip)}" if self.skip else "")

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON holds them; see `of_json`."""
        return asdict(self) | {"compute_dtype": str(self.compute_dtype), "skip": list(self.skip)}

    @classmethod
    def of_json(cls, fields: Mapping[str, Any]) -> Self:
        """The recipe that `as_json` gave. Raises KeyError, TypeError or ValueError for other fields."""
        dtypes = {str(dtype): dtype for dtype in WEIGHT_DTYPES}
        return cls(
            **{**fields, "compute_dtype": dtypes[fields["compute_dtype"]], "skip": tuple(fields["skip"])}
        )

    @property
    def spec(self) -> QuantSpec:
        """The part that concerns a single 4-bit weight."""
        assert self.quant_type != "int8"
        return QuantSpec(self.quant_type, self.double_quant, self.blocksize, self.scale_search)

    def quantized(self, linear: nn.Linear, name: str) -> QuantizedLinear:
        """The layer that replaces `linear`; raises ValueError, naming the weight by `name`, see `from_linear`."""
        if self.quant_type == "int8":
            return Linear8bit.from_linear(
                linear, threshold=self.llm_int8_threshold, compute_dtype=self.compute_dtype, name=name
            )
        return Linear4bit.from_linear(linear, spec=self.spec, compute_dtype=self.compute_dtype, name=name)


class SkipListError(ValueError):
    """A skip list that does not fit the model; the message begins with the field, `skip: `."""


@dataclass(frozen=True)
class SkipMatch:
    """What one entry of a skip list keeps out of the quantization."""

    entry: str
    layers: tuple[str, ...]  # paths of linear layers
    parameters: int  # elements of their weights


def is_skipped(path: str, skip: Sequence[str]) -> bool:
    """Whether diffusers' bitsandbytes quantizer would leave the linear layer at `path` alone.

    The rule of `_replace_with_bnb_linear` (diffusers 0.42), to the letter, so that an exported list means the
    same layers there: an entry matches the leaf name, the whole path, or, with a dot after it, any piece of it.
    """
    leaf = path.rpartition(".")[2]
    return any(entry in (leaf, path) or f"{entry}." in path for entry in skip)


def kept_in_fp32(model: nn.Module | type[nn.Module]) -> tuple[str, ...]:
    """Names that the model's class keeps in fp32; diffusers adds them to every skip list."""
    names = getattr(model, "_keep_in_fp32_modules", None) or ()
    return (names,) if isinstance(names, str) else tuple(names)


def skip_matches(model: nn.Module, skip: Sequence[str]) -> tuple[SkipMatch, ...]:
    """For each entry of a skip list, the linear layers it matches in `model`, on meta or not."""
    linears = dict(linear_layers(model))
    matches = []
    for entry in skip:
        layers = tuple(path for path in linears if is_skipped(path, (entry,)))
        parameters = sum(linears[path].in_features * linears[path].out_features for path in layers)
        matches.append(SkipMatch(entry, layers, parameters))
    return tuple(matches)


def convert(model: nn.Module, recipe: QuantRecipe, *, check_skip: bool = True) -> tuple[str, ...]:
    """Replace the linear layers of `model` in place by quantized ones; returns their paths.

    Layers with values are quantized where they are; layers on meta wait for theirs. With `check_skip` a skip
    list is refused (SkipListError) where an entry matches nothing, and warned about where it matches more than it
    seems to say; off, for lists that a checkpoint brings along. Raises ValueError as well where adapters are
    already on the model, or no layer is left to quantize.
    """
    model_name = type(model).__name__
    if getattr(model, "peft_config", None):
        raise ValueError(f"{model_name}: has adapters already; quantize the base first, then add them")
    if check_skip:
        check_skip_list(model, recipe.skip)
    skip = (*recipe.skip, *kept_in_fp32(model))
    replaced = []
    for path, linear in list(linear_layers(model)):
        if isinstance(linear, QuantizedLinear) or is_skipped(path, skip):
            continue
        model.set_submodule(path, recipe.quantized(linear, f"{path}.weight"))
        replaced.append(path)
    if not replaced:
        raise ValueError(
            f"{model_name}: no linear layer to quantize; it has none, or skip={list(skip)} names them all"
        )
    return tuple(replaced)


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Every linear layer of a model with its path."""
    # Duplicates included: a layer under two names is two entries of a checkpoint, and two layers to diffusers.
    for path, module in model.named_modules(remove_duplicate=False):
        if path and isinstance(module, nn.Linear):
            yield path, module


def refuse_unmatched(model: nn.Module, skip: Sequence[str]) -> Sequence[SkipMatch]:
    """What the entries match. Raises SkipListError where one matches no linear layer."""
    matches = skip_matches(model, skip)
    for match in matches:
        if match.layers:
            continue
        modules = {path for path, _ in model.named_modules()}
        known = modules | {path.rpartition(".")[2] for path in modules}
        near = difflib.get_close_matches(match.entry, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        holders = dict.fromkeys(path.partition(".")[0] for path, _ in linear_layers(model))
        raise SkipListError(
            f"skip: got {match.entry!r}, which matches no linear layer of {type(model).__name__}; expected names or"
            f" paths of layers, or of modules that hold some: {', '.join(holders)} or what is inside of them{hint}"
        )
    return matches


def check_skip_list(model: nn.Module, skip: Sequence[str]) -> None:
    """As `refuse_unmatched`; warns where an entry matches more than it seems to say."""
    matches = refuse_unmatched(model, skip)
    model_name = type(model).__name__
    modules = {path for path, _ in model.named_modules()}
    for match in matches:
        # Whoever names a module by its full path means that module, and gets every layer of the name.
        surplus = [path for path in match.layers if not f"{path}.".startswith(f"{match.entry}.")]
        if match.entry in modules and surplus:
            log.warning(
                "skip: %r matches %d linear layers of %s (%s parameters stay unquantized), of them %d besides"
                " the module of that path, %s first; diffusers matches names anywhere in a path, so no list can"
                " mean that module alone",
                match.entry,
                len(match.layers),
                model_name,
                f"{match.parameters:,}",
                len(surplus),
                surplus[0],
            )

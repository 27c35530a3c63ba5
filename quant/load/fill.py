"""Loads a checkpoint's tensors into a model on meta, and quantizes the weights of its quantized layers."""

from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import closing

import torch
from torch import Tensor, nn

from halfbyte.quant.files.read_ahead import FileRead, ReadAhead
from halfbyte.quant.files.shards import ShardedWeights
from halfbyte.quant.layers.quantized_layer import QuantizedLayer
from halfbyte.quant.load.serialize import split_statistic

OnProgress = Callable[[int, int], None]
"""Called after each tensor with (bytes done, total bytes)."""

Finish = Callable[[str, Tensor], Tensor]
"""Converts a tensor after it was read, by its name."""

OnLayerLoaded = Callable[[str, QuantizedLayer], None]
"""Called with the path of each quantized layer and the layer, once it has its weight; may move the weight."""

Statistics = Mapping[str, Mapping[str, str]]
"""Name of a packed weight -> suffix of each of its statistics -> the statistic's name in the file."""

_SHOWN = 5  # names in an error message
# Short statistics are read to the host, where their values are checked. These long ones are read to the
# device.
_LONG_STATISTICS = ("absmax", "SCB")


def fill(
    model: nn.Module,
    weights: ShardedWeights,
    *,
    packed: bool,
    dtype: torch.dtype,
    device: torch.device,
    in_fp32: Collection[str] = (),
    leave_out: Collection[str] = (),
    progress: OnProgress | None = None,
    on_file: FileRead | None = None,
    finish: Finish | None = None,
    place: OnLayerLoaded | None = None,
) -> None:
    """Gives every parameter and buffer of `model` its value on `device`, in `dtype` unless it is packed.

    packed: True if the files hold the weights of quantized layers packed; False to quantize them here.
    place: called with each quantized layer when it has its weight, and may move it; then `device` need not
        hold all layers at once.
    finish: converts each tensor that is not packed after it was read.
    in_fp32: names of modules that stay in fp32.
    leave_out: names of tensors in the files or in the model to ignore. All other names must be in both.

    Raises ValueError, naming the file or the tensor, for missing, unexpected or damaged tensors, and for
    tensors that are not finite. Errors that are visible in the files' headers are raised before any tensor is
    read.
    """
    own = dict(model.state_dict())
    statistics = packed_statistics(model, weights.names) if packed else {}
    statistic_names = {name for suffixes in statistics.values() for name in suffixes.values()}
    names = _checked_names(model, weights, statistic_names, packed=packed, leave_out=leave_out)
    packed_layers = {name for name in names if packed and _is_quantized(model, name)}
    total = sum(_nbytes(weights, name) for name in (*names, *statistic_names))
    done = 0
    for name, parts in _complete(weights, names, statistics, device, on_file):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        tensor = parts.pop(name)
        if finish is not None and name not in packed_layers:
            tensor = finish(name, tensor)
        tensor_dtype = torch.float32 if set(in_fp32) & set(name.split(".")) else dtype
        try:
            if name in packed_layers:
                assert isinstance(module, QuantizedLayer)
                found = {suffix: parts[key] for suffix, key in statistics.get(name, {}).items()}
                module.load_packed(tensor, found, name)
            elif isinstance(module, QuantizedLayer) and leaf == "weight":
                module.quantize(tensor.to(tensor_dtype), name)
            else:
                value = tensor.to(tensor_dtype) if own[name].is_floating_point() else tensor
                check_finite(name, value)
                _place(module, leaf, value)
        except ValueError as error:
            raise ValueError(f"{weights.path(name)}: {error}") from error
        if place is not None and isinstance(module, QuantizedLayer) and leaf == "weight":
            place(path, module)
        done += sum(_nbytes(weights, part) for part in (name, *parts))
        if progress is not None:
            progress(done, total)


def check_headers(
    model: nn.Module, weights: ShardedWeights, *, packed: bool, leave_out: Collection[str] = ()
) -> None:
    """Compares the names and shapes in the files' headers with the model, which may be on meta.

    Raises ValueError, see `fill`.
    """
    statistics = packed_statistics(model, weights.names) if packed else {}
    statistic_names = {name for suffixes in statistics.values() for name in suffixes.values()}
    _checked_names(model, weights, statistic_names, packed=packed, leave_out=leave_out)


def _checked_names(
    model: nn.Module,
    weights: ShardedWeights,
    statistic_names: Collection[str],
    *,
    packed: bool,
    leave_out: Collection[str],
) -> list[str]:
    """Returns the checked names without those of statistics, in the order of the files."""
    own = dict(model.state_dict())
    names = [name for name in weights.names if name not in statistic_names and name not in leave_out]
    _check_names(weights, own.keys() - set(leave_out), set(names))
    for name in names:
        if not (packed and _is_quantized(model, name)):
            _check_header(weights, name, own[name])
    return names


def packed_statistics(model: nn.Module, names: Collection[str]) -> Statistics:
    """Finds the names that are statistics of the model's quantized layers."""
    statistics: dict[str, dict[str, str]] = {}
    for name in names:
        parts = split_statistic(name)
        if parts is not None and _is_quantized(model, parts[0]):
            statistics.setdefault(parts[0], {})[parts[1]] = name
    return statistics


def _is_quantized(model: nn.Module, name: str) -> bool:
    """Tests whether `name` is the weight of a quantized layer."""
    path, _, leaf = name.rpartition(".")
    try:
        return leaf == "weight" and isinstance(model.get_submodule(path), QuantizedLayer)
    except AttributeError:  # the model has no such module
        return False


def _complete(
    weights: ShardedWeights,
    names: Collection[str],
    statistics: Statistics,
    device: torch.device,
    on_file: FileRead | None,
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yields each name with its tensor and its statistics, by name, as soon as all of them have been read."""
    owner = {key: name for name, suffixes in statistics.items() for key in suffixes.values()}
    expected = {name: 1 + len(statistics.get(name, ())) for name in names}
    found: dict[str, dict[str, Tensor]] = {}
    with closing(_tensors(weights, names, statistics, device, on_file)) as tensors:
        for key, tensor in tensors:
            name = owner.get(key, key)
            found.setdefault(name, {})[key] = tensor
            # This reference would keep the tensor alive after the caller has finished with it.
            del tensor
            if len(found[name]) == expected[name]:
                yield name, found.pop(name)


def _tensors(
    weights: ShardedWeights,
    names: Collection[str],
    statistics: Statistics,
    device: torch.device,
    on_file: FileRead | None,
) -> Generator[tuple[str, Tensor], None, None]:
    """Yields the names and their statistics with their tensors, in the order of the files."""
    short = {
        key
        for suffixes in statistics.values()
        for suffix, key in suffixes.items()
        if suffix not in _LONG_STATISTICS
    }
    keys = {*names, *(key for suffixes in statistics.values() for key in suffixes.values())}
    yield from ReadAhead(weights, keys, device, on_host=short, on_file=on_file)


def _check_names(weights: ShardedWeights, expected: set[str], found: set[str]) -> None:
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    problems = [
        f"{len(names)} {problem} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
        for problem, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if problems:
        raise ValueError(
            f"{weights.folder}: the weights do not match config.json: {'; '.join(problems)}; download the model"
            " again, in the layout of diffusers"
        )


def _check_header(weights: ShardedWeights, name: str, own: Tensor) -> None:
    stored = weights.stored(name)
    if stored.shape != tuple(own.shape):
        raise ValueError(
            f"{weights.path(name)}: {name}: got shape {stored.shape}, expected {tuple(own.shape)} by the model's"
            " config.json; one of the two files is damaged or of another model: download both again"
        )
    if own.is_floating_point() and not stored.dtype.is_floating_point:
        raise ValueError(
            f"{weights.path(name)}: {name}: got {stored.dtype}, expected a floating-point tensor"
        )


def _nbytes(weights: ShardedWeights, name: str) -> int:
    stored = weights.stored(name)
    return stored.stop - stored.start


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises ValueError, naming the tensor, if it is not finite, which a cast to float16 can cause."""
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise ValueError(f"{name}: contains NaN or infinite values as {tensor.dtype}")


def _place(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    """Replaces a parameter or buffer of the module, which is on meta, by one with this value."""
    parameter = module._parameters.get(leaf)
    if parameter is None:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)

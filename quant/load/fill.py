"""Put a checkpoint's tensors into a model that waits for them on meta, quantizing those that are to be quantized."""

from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import closing

import torch
from torch import Tensor, nn

from halfbyte.quant.files.digest import file_digest
from halfbyte.quant.files.read_ahead import FileRead, ReadAhead
from halfbyte.quant.files.shards import ShardedWeights
from halfbyte.quant.layers.quantized_layer import QuantizedLayer
from halfbyte.quant.load.serialize import split_statistic

OnProgress = Callable[[int, int], None]
"""Called after each tensor with (bytes done, bytes in all)."""

Finish = Callable[[str, Tensor], Tensor]
"""What a tensor as it was read becomes, by its name."""

OnLayerLoaded = Callable[[str, QuantizedLayer], None]
"""Called with each quantized layer, by its path, when it has its weight; may put that elsewhere."""

Statistics = Mapping[str, Mapping[str, str]]
"""The weight of a packed layer -> the statistics beside it, by suffix -> their names in the file."""

_SHOWN = 5  # names in an error message
# Statistics are checked on the host, but for the long ones, which nobody need look at there.
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
    """Give every parameter and buffer of `model` its value on `device`, in `dtype` where it is not packed.

    packed: the weights of quantized layers are packed in the files; else they are quantized here.
    place: what becomes of a quantized layer, one by one, so that not all of them need be on `device`.
    finish: what is still to be done to a tensor that is not packed, by its name, once it has been read.
    in_fp32: names of modules that stay in fp32. leave_out: what of the files or the model's own names is passed
    over; all others must be in both.

    Raises ValueError, naming the file or the tensor, which must be finite where the model is quantized. What can be
    told from the files' headers is told before anything is read.
    """
    quantized = any(isinstance(module, QuantizedLayer) for module in model.modules())
    own = dict(model.state_dict())
    statistics = packed_statistics(model, weights.names) if packed else {}
    beside = {name for suffixes in statistics.values() for name in suffixes.values()}
    names = [name for name in weights.names if name not in beside and name not in leave_out]
    _check_names(weights, own.keys() - set(leave_out), set(names))
    packed_layers = {name for name in names if packed and _is_quantized(model, name)}
    for name in names:
        if name not in packed_layers:
            _check_header(weights, name, own[name])
    total = sum(_nbytes(weights, name) for name in (*names, *beside))
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
                if quantized:
                    check_finite(name, value)
                _place(module, leaf, value)
        except ValueError as error:
            raise ValueError(f"{weights.path(name)}: {error}") from error
        if place is not None and isinstance(module, QuantizedLayer) and leaf == "weight":
            place(path, module)
        done += sum(_nbytes(weights, part) for part in (name, *parts))
        if progress is not None:
            progress(done, total)


def packed_statistics(model: nn.Module, names: Collection[str]) -> Statistics:
    """What of a file's `names` are statistics of quantized layers of the model."""
    statistics: dict[str, dict[str, str]] = {}
    for name in names:
        parts = split_statistic(name)
        if parts is not None and _is_quantized(model, parts[0]):
            statistics.setdefault(parts[0], {})[parts[1]] = name
    return statistics


def _is_quantized(model: nn.Module, name: str) -> bool:
    """Whether `name` is the weight of a quantized layer."""
    path, _, leaf = name.rpartition(".")
    try:
        return leaf == "weight" and isinstance(model.get_submodule(path), QuantizedLayer)
    except AttributeError:  # a name that the model does not know
        return False


def _complete(
    weights: ShardedWeights,
    names: Collection[str],
    statistics: Statistics,
    device: torch.device,
    on_file: FileRead | None,
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each name with its tensor and those of its statistics, by name, as soon as all of them have been read."""
    owner = {key: name for name, suffixes in statistics.items() for key in suffixes.values()}
    lacking = {name: 1 + len(statistics.get(name, ())) for name in names}
    found: dict[str, dict[str, Tensor]] = {}
    with closing(_tensors(weights, names, statistics, device, on_file)) as tensors:
        for key, tensor in tensors:
            name = owner.get(key, key)
            found.setdefault(name, {})[key] = tensor
            del tensor
            if len(found[name]) == lacking[name]:
                yield name, found.pop(name)


def _tensors(
    weights: ShardedWeights,
    names: Collection[str],
    statistics: Statistics,
    device: torch.device,
    on_file: FileRead | None,
) -> Generator[tuple[str, Tensor], None, None]:
    """Names, with their statistics, in the order of the files."""
    short = {
        key
        for suffixes in statistics.values()
        for suffix, key in suffixes.items()
        if suffix not in _LONG_STATISTICS
    }
    keys = {*names, *(key for suffixes in statistics.values() for key in suffixes.values())}
    if statistics and device.type == "cpu":
        # Packed weights are used where they lie: mapped, and shared with whoever else has mapped them.
        if on_file is not None:
            for path in weights.files:
                on_file(path, file_digest(path))
        for key in weights.names:
            if key in keys:
                yield key, weights.read(key)
        return
    yield from ReadAhead(weights, keys, device, on_host=short, on_file=on_file)


def _check_names(weights: ShardedWeights, expected: set[str], found: set[str]) -> None:
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    problems = [
        f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if problems:
        raise ValueError(f"{weights.folder}: the weights do not fit config.json: {'; '.join(problems)}")


def _check_header(weights: ShardedWeights, name: str, own: Tensor) -> None:
    stored = weights.stored(name)
    if stored.shape != tuple(own.shape):
        raise ValueError(
            f"{weights.path(name)}: {name}: expected shape {tuple(own.shape)}, got {stored.shape}"
        )
    if own.is_floating_point() and not stored.dtype.is_floating_point:
        raise ValueError(
            f"{weights.path(name)}: {name}: expected a floating-point tensor, got {stored.dtype}"
        )


def _nbytes(weights: ShardedWeights, name: str) -> int:
    stored = weights.stored(name)
    return stored.stop - stored.start


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises ValueError, naming the tensor, where it holds NaN or infinity, which a cast to float16 may bring."""
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise ValueError(f"{name}: holds NaN or infinite values as {tensor.dtype}")


def _place(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    parameter = module._parameters.get(leaf)
    if parameter is None:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)

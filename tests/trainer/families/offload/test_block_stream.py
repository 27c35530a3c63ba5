"""Block streaming: products read the weights on the device, never stale ones; results do not change."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.layers.on_host import held_tensors, hold_on_host
from halfbyte.quant.layers.quantized_layer import QuantizedLayer
from halfbyte.quant.load.serialize import base_tensors
from halfbyte.trainer.adapters.lora import add_lora, trained_parameters
from halfbyte.trainer.denoiser.base import load_base
from halfbyte.trainer.denoiser.settings import block_names
from halfbyte.trainer.families.blocks.fused_block import BlockSettings, Keep
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.families.offload.activations import HostStore
from halfbyte.trainer.families.offload.block_stream import ROOMS, BlockStream, Visitors, packed_blocks
from halfbyte.trainer.families.offload.copies import DirectCopies
from halfbyte.trainer.families.sd3.family import SD3

from steps import batch_for, module_of

CPU = torch.device("cpu")
FAMILIES = [(Flux, "mini_flux"), (SD3, "mini_sd3")]
each_family = pytest.mark.parametrize(("family_class", "fixture"), FAMILIES, ids=["flux", "sd3"])
SETTINGS = {
    "full": BlockSettings("inputs"),
    "offload": BlockSettings("inputs", store=HostStore()),
    "selective": BlockSettings("attention"),
    "none": BlockSettings("everything"),
    "full by layer": BlockSettings("inputs", whole=False),
    "none by layer": BlockSettings("everything", whole=False),
}


OTHERS: dict[str, tuple[Keep, dict[str, Any]]] = {
    "int8": ("everything", {"quant": "int8"}),
    "PEFT's layers": ("everything", {"fused": False}),
    "dropout": ("inputs", {"dropout": 0.3}),
    # Here the modulation's input needs a gradient, which flows through packed weights too.
    "learning time": ("everything", {"targets": r"time_text_embed\..*linear_1|.*norm1\.linear|.*attn\.to_q"}),
    "some blocks": ("inputs", {"targets": r"(single_)?transformer_blocks\.1\.attn\.to_[qkv]"}),
}


class ReadableOnTheDeviceAlone(DirectCopies):
    """Inverts the weights' bits on the host, so a product that reads them there gives a wrong result."""

    def __init__(self) -> None:
        super().__init__(CPU)

    def copy(self, source: Tensor, target: Tensor, after: Any) -> None:
        torch.bitwise_not(source, out=target)


class Poisoning(BlockStream):
    """Overwrites a room when its block's visit ends."""

    def _leave(self) -> None:
        super()._leave()
        for room in self._rooms:
            # Only the room just left, which is the last. The other one holds the block of the next visit.
            if room is self._rooms[-1]:
                room.memory.fill_(0xA5)
                room.holds = None


def opened(request: pytest.FixtureRequest, family_class: type[Family], fixture: str) -> Family:
    return family_class.open(str(request.getfixturevalue(fixture)), None, 24)


def loaded(
    family: Family,
    settings: BlockSettings,
    *,
    quant: str = "nf4",
    fused: bool = True,
    targets: str | None = None,
    dropout: float = 0.0,
) -> nn.Module:
    recipe = QuantRecipe(quant_type=quant, compute_dtype=torch.float32)
    denoiser = load_base(family, recipe, device=CPU, dtype=torch.float32)
    add_lora(
        denoiser,
        rank=4,
        alpha=8,
        dropout=dropout,
        targets=targets or family.lora_targets("all-linear"),
        init="gaussian",
        seed=1,
        fused=fused,
    )
    family.fuse_blocks(denoiser, settings)
    draws = torch.Generator().manual_seed(7)
    for name, parameter in trained_parameters(denoiser).items():
        if ".lora_B." in name:  # at zero, A would have no gradient
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=draws))
    return denoiser.train()


def streamed(
    family: Family,
    denoiser: nn.Module,
    copies: DirectCopies | None = None,
    stream_class: type[BlockStream] = Poisoning,
) -> BlockStream:
    """Streams the denoiser's blocks, by default from inverted host memory."""
    blocks = packed_blocks(denoiser, block_names(family))
    for block in blocks:
        for layer in block.modules():
            if isinstance(layer, QuantizedLayer):
                hold_on_host(layer)
    copies = copies or ReadableOnTheDeviceAlone()
    stream = stream_class(blocks, copies)
    if isinstance(copies, ReadableOnTheDeviceAlone):
        for block in stream._blocks:
            block.bytes.bitwise_not_()
    return stream


def steps(family: Family, denoiser: nn.Module) -> Iterator[Tensor]:
    """Yields losses and gradients of a step of two micro-batches and of one, and a prediction after each."""
    module = module_of(family, denoiser, torch.float32)
    parameters = list(trained_parameters(denoiser).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for step in range(2):
        for micro in range(2 - step):
            torch.manual_seed(step)
            loss = module.loss(batch_for(family, (4 * step + micro, 7)))
            loss.backward()
            yield loss.detach().clone()
        yield from (p.grad.clone() for p in parameters if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        torch.manual_seed(step)
        with torch.no_grad():
            predicted = module.loss(batch_for(family))
        yield predicted


def assert_equal(ours: Iterator[Tensor], theirs: Iterator[Tensor]) -> None:
    compared = 0
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
        compared += 1
    assert compared > 10


@each_family
@pytest.mark.parametrize("name", SETTINGS)
def test_streamed_steps_are_bitwise_identical(
    request: pytest.FixtureRequest, family_class: type[Family], fixture: str, name: str
) -> None:
    family = opened(request, family_class, fixture)
    plain, visiting = (loaded(family, SETTINGS[name]) for _ in range(2))
    stream = streamed(family, visiting)
    assert_equal(steps(family, visiting), steps(family, plain))
    # More blocks than rooms, so the rooms were reused.
    assert len(packed_blocks(visiting, block_names(family))) > ROOMS
    assert stream.copied > 3 * stream.host_bytes


@each_family
@pytest.mark.parametrize("how", OTHERS)
def test_other_layers_can_be_streamed_too(
    request: pytest.FixtureRequest, family_class: type[Family], fixture: str, how: str
) -> None:
    family = opened(request, family_class, fixture)
    keep, options = OTHERS[how]
    plain, visiting = (loaded(family, BlockSettings(keep), **options) for _ in range(2))
    streamed(family, visiting)
    assert_equal(steps(family, visiting), steps(family, plain))


class LateCopies(ReadableOnTheDeviceAlone):
    """Simulates a device that copies as late as allowed, and notes the last operation that read each room."""

    def __init__(self) -> None:
        super().__init__()
        self.pending: list[tuple[int, Tensor, Tensor]] = []
        self.launched = 0  # operations so far
        self.issued = 0  # copies so far
        self.last_read: dict[int, int] = {}  # address of a storage -> number of the operation
        self.copying = False  # the running operations are this class's own copies

    def now(self) -> Any:
        return self.launched

    def copy(self, source: Tensor, target: Tensor, after: Any) -> Any:
        place = target.untyped_storage().data_ptr()
        assert self.last_read.get(place, 0) <= after, "overwritten while it may be read"
        self.issued += 1
        self.pending.append((self.issued, source, target))
        return self.issued

    def wait(self, arrived: Any) -> None:
        self.copying = True
        while self.pending and self.pending[0][0] <= arrived:
            _, source, target = self.pending.pop(0)
            torch.bitwise_not(source, out=target)
        self.copying = False


class Reads(TorchDispatchMode):
    """Reports every operation to the device, and asserts that none reads weights that have not arrived."""

    def __init__(self, device: LateCopies) -> None:
        super().__init__()
        self.device = device
        self.reading = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = self.device
        returns = func._schema.returns
        a_view = any(part.alias_info is not None and not part.alias_info.is_write for part in returns)
        if not device.copying and not a_view:
            device.launched += 1
            on_their_way = {target.untyped_storage().data_ptr() for _, _, target in device.pending}
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor):
                    place = leaf.untyped_storage().data_ptr()
                    assert place not in on_their_way, "read before it has arrived"
                    device.last_read[place] = device.launched
                    self.reading += place in self.rooms
        return func(*args, **(kwargs or {}))

    rooms: frozenset[int] = frozenset()


@each_family
@pytest.mark.parametrize("name", ["full", "none", "full by layer"])
def test_no_room_is_read_before_its_copy_or_overwritten_while_it_is_read(
    request: pytest.FixtureRequest, family_class: type[Family], fixture: str, name: str
) -> None:
    family = opened(request, family_class, fixture)
    plain, visiting = (loaded(family, SETTINGS[name]) for _ in range(2))
    expected = [one.clone() for one in steps(family, plain)]
    device = LateCopies()
    stream = streamed(family, visiting, device, BlockStream)
    watched = Reads(device)
    watched.rooms = frozenset(room.memory.untyped_storage().data_ptr() for room in stream._rooms)
    with watched:
        found = list(steps(family, visiting))
    assert_equal(iter(found), iter(expected))
    assert watched.reading > 100
    assert device.issued > 3 * len(stream._blocks)


def test_a_step_copies_only_blocks_that_are_not_on_the_device(mini_flux: Any) -> None:
    family = family_at(mini_flux)
    denoiser = loaded(family, SETTINGS["full"])
    stream = streamed(family, denoiser, stream_class=BlockStream)
    module = module_of(family, denoiser, torch.float32)
    blocks = [block.nbytes for block in stream._blocks]
    for _ in range(3):
        before = stream.copied
        module.loss(batch_for(family)).backward()
    # Forward and backward each begin with two blocks that are already there.
    assert stream.copied - before == sum(blocks[2:]) + sum(blocks[:-2])
    assert stream.copied - before == Visitors(denoiser, block_names(family)).copied
    with torch.no_grad():
        module.loss(batch_for(family))
        before = stream.copied
        module.loss(batch_for(family))
    # Forward after forward: the first block is copied while the last computes.
    assert stream.copied - before == sum(blocks)


def test_a_room_is_as_large_as_the_largest_block(mini_flux: Any) -> None:
    family = family_at(mini_flux)
    denoiser = loaded(family, SETTINGS["full"])
    sizes = Visitors(denoiser, block_names(family)).sizes
    stream = streamed(family, denoiser)
    assert len(set(sizes)) == 2  # dual and single blocks
    assert [block.nbytes for block in stream._blocks] == sizes
    assert stream.device_bytes == ROOMS * max(sizes)
    assert stream.host_bytes == sum(sizes)
    for block in stream._blocks:
        assert all(view.data_ptr() % 64 == 0 for view in block.views(stream._rooms[0].memory))


def test_the_step_after_a_failed_one_is_correct(mini_flux: Any) -> None:
    family = family_at(mini_flux)
    plain, visiting = (loaded(family, SETTINGS["full"]) for _ in range(2))
    streamed(family, visiting)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    module: Any = visiting
    for norm in (module.transformer_blocks[0].norm1, module.single_transformer_blocks[1].norm):
        broken = norm.linear.register_forward_pre_hook(full)
        with pytest.raises(torch.OutOfMemoryError):
            module_of(family, visiting, torch.float32).loss(batch_for(family))
        broken.remove()
    loss = module_of(family, visiting, torch.float32).loss(batch_for(family))
    with pytest.raises(torch.OutOfMemoryError), torch.autograd.graph.saved_tensors_hooks(lambda t: t, full):
        module_of(family, visiting, torch.float32).loss(batch_for(family)).backward()
    loss.backward()
    expected = module_of(family, plain, torch.float32).loss(batch_for(family))
    expected.backward()
    assert torch.equal(loss, expected)
    pairs = zip(trained_parameters(visiting).values(), trained_parameters(plain).values(), strict=True)
    assert all(torch.equal(ours.grad, theirs.grad) for ours, theirs in pairs)  # type: ignore[arg-type]


def test_moving_the_model_leaves_the_packed_weights_of_blocks_on_the_host(mini_flux: Any) -> None:
    family = family_at(mini_flux)
    denoiser = loaded(family, SETTINGS["full"])
    footprint = denoiser.get_memory_footprint()  # type: ignore[operator]
    expected = {name: tensor.clone() for name, tensor in base_tensors(denoiser).items()}
    blocks = packed_blocks(denoiser, block_names(family))
    streamed(family, denoiser, DirectCopies(CPU), BlockStream)  # with plain copies, not inverted
    module_of(family, denoiser, torch.float32).loss(batch_for(family)).backward()
    assert denoiser.get_memory_footprint() == footprint  # type: ignore[operator]
    found = base_tensors(denoiser)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for move in (denoiser.double, lambda: denoiser.to("meta")):
        move()
        for block in blocks:
            for layer in block.modules():
                if isinstance(layer, QuantizedLayer):
                    assert {tensor.device for tensor in held_tensors(layer)} == {CPU}
                    assert layer.weight.dtype == torch.uint8
    assert {p.device.type for p in trained_parameters(denoiser).values()} == {"meta"}


def family_at(folder: Any) -> Family:
    return Flux.open(str(folder), None, 24)

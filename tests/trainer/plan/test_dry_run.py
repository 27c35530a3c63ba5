"""A dry run on meta tensors compared with the real step: kept memory, live memory and work."""

from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from halfbyte.kernels.gelu.ops import gelu_tanh_gradients
from halfbyte.quant.layers.quantized_layer import QuantizedLayer
from halfbyte.trainer.adapters.lora import trained_parameters
from halfbyte.trainer.data.batches import Batch
from halfbyte.trainer.denoiser.base import load_base
from halfbyte.trainer.denoiser.load import add_adapters, load_denoiser
from halfbyte.trainer.denoiser.settings import block_settings, quant_recipe
from halfbyte.trainer.families.catalog import FAMILIES
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.optim.optimizers import OPTIMIZERS, OptimizerChoice
from halfbyte.trainer.plan.dry_run import ADAPTERS, GRADIENTS, VISITING, DryRun
from halfbyte.trainer.plan.memory_tracker import INSIDE, WORKING, LiveBytes, allocated
from halfbyte.trainer.plan.op_costs import costs_of
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.runtime.world import read_world
from halfbyte.trainer.training.module import training_module

from runs import write_recipe

SIDE = 96  # pixels of the images


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, mini_flux: Any, mini_sd3: Any) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("dry_run")
    return {
        name: write_recipe(root, model, family=name, name=name)
        for name, model in (("flux", mini_flux), ("sd3", mini_sd3))
    }


def opened(recipe: Recipe) -> Family:
    model = recipe.model
    return FAMILIES[model.family].open(model.path, model.revision, model.max_sequence_length)


def batch_for(recipe: Recipe, family: Family) -> Batch:
    size, side = recipe.train.batch_size, SIDE // family.vae_scale
    config, channels = family.denoiser_config, family.vae_config["latent_channels"]
    draws = torch.Generator().manual_seed(0)
    return Batch(
        tuple(range(size)),
        torch.randn(size, channels, side, side, generator=draws),
        torch.ones(size, channels, side, side),
        torch.randn(size, family.text_tokens, config["joint_attention_dim"], generator=draws).bfloat16(),
        torch.randn(size, config["pooled_projection_dim"], generator=draws).bfloat16(),
    )


class SavedBytes:
    """Counts the storages that autograd keeps, except parameters."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self._own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._kept: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in self._own:
            self._kept[place] = allocated(tensor.untyped_storage().nbytes())
        return tensor

    @property
    def nbytes(self) -> int:
        return sum(self._kept.values())


@pytest.mark.parametrize("family_name", ["flux", "sd3"])
@pytest.mark.parametrize(
    "settings",
    [
        ("train.gradient_checkpointing=full",),
        ("train.gradient_checkpointing=selective", "train.batch_size=2"),
        ("train.gradient_checkpointing=none", "lora.rank=16"),
        ("train.gradient_checkpointing=none", "train.fused_blocks=false"),
        ("train.gradient_checkpointing=full", "lora.targets=attention", "train.fused_blocks=false"),
    ],
)
def test_a_dry_step_uses_the_memory_of_a_real_step(
    folders: dict[str, Any], family_name: str, settings: tuple[str, ...]
) -> None:
    """With an unquantized fp32 base, whose operations are the same on every device."""
    recipe = load_recipe(folders[family_name], [*settings, "quant.type=none", "train.grad_accumulation=1"])
    family = opened(recipe)
    dry_run = DryRun(recipe, family)
    predicted = dry_run.step(recipe, SIDE, SIDE)

    denoiser = load_base(family, None, device=torch.device("cpu"), dtype=torch.float32)
    add_adapters(recipe, family, denoiser)
    family.fuse_blocks(denoiser, block_settings(recipe, "cpu"))
    module = training_module(recipe, family, denoiser, torch.float32)
    adapters = list(trained_parameters(denoiser).values())
    live = LiveBytes("cpu")
    live.hold([*denoiser.parameters(), *denoiser.buffers()], "weights")
    batch = batch_for(recipe, family)
    inputs = [batch.latent_mean, batch.latent_std, batch.prompt_embeds, batch.pooled_prompt_embeds]
    live.hold(inputs, "batch")
    saved = SavedBytes([*denoiser.parameters(), *denoiser.buffers()])
    with live:
        for parameter in adapters:
            parameter.grad = torch.zeros_like(parameter)
        live.hold([parameter.grad for parameter in adapters if parameter.grad is not None], "gradients")
        live.restart()
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            loss = module.loss(batch)
        assert live.name_rest("kept") == pytest.approx(predicted.kept, rel=0.02)
        if "train.fused_blocks=false" not in settings:
            # Autograd's list lacks the tensors that blocks keep themselves, above all the RoPE tables.
            assert 0.85 * predicted.kept <= saved.nbytes <= 1.01 * predicted.kept
        for parameter in adapters:
            parameter.grad = None
        loss.backward()
    assert predicted.peak.nbytes == pytest.approx(live.peak.nbytes, rel=0.03)
    gradients = sum(allocated(parameter.grad.nbytes) for parameter in adapters if parameter.grad is not None)
    assert dry_run.held[ADAPTERS] == gradients


@pytest.mark.parametrize("family_name", ["flux", "sd3"])
@pytest.mark.parametrize("quant", ["nf4", "fp4", "int8"])
def test_the_base_uses_the_predicted_memory(folders: dict[str, Any], family_name: str, quant: str) -> None:
    recipe = load_recipe(folders[family_name], [f"quant.type={quant}", "quant.compute_dtype=bfloat16"])
    family = opened(recipe)
    held = DryRun(recipe, family).held
    denoiser: Any = load_base(family, quant_recipe(recipe), device=torch.device("cpu"), dtype=torch.bfloat16)
    real = denoiser.get_memory_footprint()
    # Every tensor is rounded up to 512 bytes, and the miniature model has many small tensors.
    tensors = 7 * len(list(denoiser.parameters()))
    assert 0 <= sum(nbytes for kind, nbytes in held.items() if kind != ADAPTERS) - real <= 512 * tensors
    assert any(kind.startswith("packed") for kind in held)


def test_checkpointing_keeps_less_and_computes_more(folders: dict[str, Any]) -> None:
    steps = {}
    recipe = load_recipe(folders["flux"], ["quant.compute_dtype=bfloat16"])
    dry_run = DryRun(recipe, opened(recipe))
    for name in ("none", "selective", "full", "offload"):
        changed = load_recipe(
            folders["flux"], ["quant.compute_dtype=bfloat16", f"train.gradient_checkpointing={name}"]
        )
        steps[name] = dry_run.step(changed, SIDE, SIDE)
    kept = [steps[name].kept for name in ("none", "selective", "full", "offload")]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 4
    work = [steps[name].flops for name in ("none", "selective", "full")]
    assert work == sorted(work)
    assert steps["offload"].host > 0
    assert steps["full"].host == 0
    assert GRADIENTS in steps["full"].peak.by_kind
    assert sum(steps["full"].peak.by_kind.values()) == steps["full"].peak.nbytes


@pytest.mark.parametrize("family_name", ["flux", "sd3"])
def test_streamed_blocks_leave_two_buffers_on_the_device(folders: dict[str, Any], family_name: str) -> None:
    settings = ["quant.compute_dtype=bfloat16", "train.gradient_checkpointing=none"]
    recipe = load_recipe(folders[family_name], settings)
    streamed = load_recipe(folders[family_name], [*settings, "train.stream_blocks=true"])
    all_there, visiting = DryRun(recipe, opened(recipe)), DryRun(streamed, opened(recipe))
    family = opened(streamed)
    world = read_world({"ACCELERATE_USE_CPU": "true"})
    stream = load_denoiser(streamed, family, world, Console(quiet=True)).stream
    assert stream is not None
    assert visiting.visitors.host_bytes == stream.host_bytes
    assert visiting.held[VISITING] == pytest.approx(stream.device_bytes, abs=2 * 512)
    rest = {kind: nbytes for kind, nbytes in visiting.held.items() if kind != VISITING}
    # The host holds the same bytes, except for the padding of tensors and the tables that all layers share.
    layers = sum(isinstance(module, QuantizedLayer) for module in visiting.denoiser.modules())
    moved = sum(all_there.held.values()) - sum(rest.values())
    assert moved == pytest.approx(stream.host_bytes, abs=2048 * layers)
    one, other = (dry_run.step(streamed, SIDE, SIDE) for dry_run in (all_there, visiting))
    assert one.peak.nbytes - other.peak.nbytes == moved - visiting.held[VISITING]
    assert one.kept == other.kept


@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
def test_a_dry_run_allocates_no_values(folders: dict[str, Any], init: str) -> None:
    """Initializing an adapter of high rank would fill the host's memory and take minutes."""
    recipe = load_recipe(folders["flux"], ["lora.rank=2048", f"lora.init={init}"])
    family, on_cpu, called = opened(recipe), LiveBytes("cpu"), _Operations()
    with on_cpu, called:
        dry_run = DryRun(recipe, family)
    assert dry_run.held[ADAPTERS] > 3e7
    assert on_cpu.peak.nbytes < 1e5
    assert not called.names & {"aten::normal_", "aten::uniform_"}


def test_a_dry_step_draws_no_random_numbers(folders: dict[str, Any]) -> None:
    """The noise of a huge batch would not fit into host memory."""
    recipe = load_recipe(folders["flux"], ["train.batch_size=100"])
    dry_run, called = DryRun(recipe, opened(recipe)), _Operations()
    with called:
        dry_run.step(recipe, SIDE, SIDE)
        dry_run.prediction(100, SIDE, SIDE)
    assert not any(name.startswith(("aten::randn", "aten::normal")) for name in called.names)


class _Operations(TorchDispatchMode):
    """Records the names of all operations that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_a_second_dry_step_equals_the_first(folders: dict[str, Any]) -> None:
    recipe = load_recipe(folders["sd3"])
    dry_run = DryRun(recipe, opened(recipe))
    assert dry_run.step(recipe, SIDE, SIDE) == dry_run.step(recipe, SIDE, SIDE)


def test_live_bytes_counts_storages_once_and_until_they_are_freed() -> None:
    live = LiveBytes()
    with live:
        first = torch.empty(1000, device="meta")
        view = first[10:]
        assert live.now == 4096
        second = first + view.new_ones(1)
        del first
        assert live.now == 2 * 4096  # the view still holds the first
        del view
        assert live.now == 4096
        assert live.peak.nbytes == 2 * 4096 + 512
        live.name_rest("result")
        assert second.shape == (1000,)
        assert live.peak.by_kind == {WORKING: 4096 + 512, "result": 4096}
    del second
    assert live.now == 0


def test_live_bytes_adds_the_temporary_memory_of_a_kernel() -> None:
    live = LiveBytes()
    with live:
        query = torch.empty(1, 100, 2, 64, dtype=torch.bfloat16, device="meta")
        out, statistics = torch.ops.halfbyte.attention(query, query, query, "flash")
        torch.ops.halfbyte.attention_backward(out, query, query, query, out, statistics, "flash")
    assert live.peak.by_kind[INSIDE] == 4 * 2 * 128 * 65
    assert live.flops == (2 + 5) * 2 * 2 * 100 * 100 * 64


def test_a_four_bit_product_over_many_rows_dequantizes_its_weight() -> None:
    fields = (None, None, None, None, None, None, (32, 64), 64, 0)
    few, many = (torch.empty(rows, 64, dtype=torch.bfloat16, device="meta") for rows in (1, 100))
    inside = costs_of(torch.ops.halfbyte.linear_4bit.default).inside
    assert inside is not None
    assert inside((many, None, *fields), None) == 32 * 64 * 2
    assert inside((few, None, *fields), None) == 0


@pytest.mark.parametrize(("rows", "shares"), [(4096, 8), (100, 4)])
def test_gelu_gradients_have_a_partial_sum_per_share_of_the_rows(rows: int, shares: int) -> None:
    width, gb, xa = 256, 16, 8
    live = LiveBytes()
    with live:
        x, dy = (torch.empty(rows, width, dtype=torch.bfloat16, device="meta") for _ in range(2))
        narrow = [torch.empty(rows, size, dtype=torch.bfloat16, device="meta") for size in (gb, xa)]
        gelu_tanh_gradients(dy, x, *narrow, out=dy)
    assert live.peak.by_kind[INSIDE] == 4 * shares * (gb + xa) * width
    assert live.flops == 2 * rows * width * (gb + xa)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.classes))
def test_an_optimizer_keeps_its_declared_state(name: str) -> None:
    shapes = [(16, 320), (640, 16), (16, 320), (640,), (16, 96)]
    draws = torch.Generator().manual_seed(0)
    parameters = [
        (str(number), torch.nn.Parameter(torch.randn(shape, generator=draws)))
        for number, shape in enumerate(shapes)
    ]
    choice: OptimizerChoice = OPTIMIZERS[name].model_validate({"name": name})
    optimizer = choice.build(parameters)
    for _, parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=draws)
    optimizer.step()
    kept = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, Tensor) and tensor.numel() > 1
    }
    assert choice.memory(shapes).state == pytest.approx(sum(kept.values()), rel=0.03)

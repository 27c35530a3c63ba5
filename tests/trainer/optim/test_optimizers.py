"""Each optimizer learns, resumes bitwise identically from a checkpoint, and has its declared state."""

import copy
import math

import pytest
import torch
from safetensors.torch import save_file

from halfbyte.trainer.adapters.saved import ADAPTER_FILE
from halfbyte.trainer.optim.averages import OptimizerAverage
from halfbyte.trainer.optim.optimizers import (
    OPTIMIZERS,
    Adafactor,
    AdamW,
    AdamW8Bit,
    Prodigy,
    ScheduleFreeAdamW,
)
from halfbyte.trainer.run_folder import checkpoint

# Each choice with its declared state for large matrices, in fp32 values per parameter.
CHOICES = {
    "adamw": (AdamW(name="adamw", lr=1e-2), 2.0),
    "adamw_8bit": (AdamW8Bit(name="adamw_8bit", lr=1e-2), 0.508),
    "adafactor": (Adafactor(name="adafactor", lr=1e-2), 0.06),
    "prodigy": (Prodigy(name="prodigy", d0=1e-4), 4.0),
    "prodigy sliced": (Prodigy(name="prodigy", d0=1e-4, slice_p=11), 2.2),
    "schedule_free_adamw": (ScheduleFreeAdamW(name="schedule_free_adamw", lr=3e-2), 2.0),
}
each_choice = pytest.mark.parametrize("choice", [choice for choice, _ in CHOICES.values()], ids=list(CHOICES))

RANK, INPUTS, OUTPUTS = 4, 48, 40

MAGNITUDE = "layer.lora_magnitude_vector.default.weight"


class Toy:
    """y = m * B A x, with B starting at zero: an adapter that is fitted to a random layer."""

    def __init__(self, choice, device="cpu", saved=None):
        """Loads the weights of the checkpoint `saved` before the optimizer is built, as a run does."""
        draws = torch.Generator().manual_seed(3)
        self.x = torch.randn(64, INPUTS, generator=draws).to(device)
        self.y = self.x @ torch.randn(INPUTS, OUTPUTS, generator=draws).to(device) / INPUTS**0.5
        down = torch.randn(RANK, INPUTS, generator=draws) / RANK
        self.parameters = {
            "layer.lora_A": torch.nn.Parameter(down.to(device)),
            MAGNITUDE: torch.nn.Parameter(torch.ones(OUTPUTS, device=device)),
            "layer.lora_B": torch.nn.Parameter(torch.zeros(OUTPUTS, RANK, device=device)),
        }
        for name, value in saved.adapter.items() if saved else ():
            self.parameters[name].data.copy_(value)
        self.optimizer = choice.build(list(self.parameters.items()))
        if saved:
            checkpoint.restore_optimizer(self.optimizer, saved.optimizer)

    def loss(self):
        a, magnitude, b = self.parameters.values()
        return ((self.x @ a.t() @ b.t() * magnitude - self.y) ** 2).mean()

    def steps(self, count, first=0):
        for step in range(first, first + count):
            loss = self.loss()
            self.optimizer.zero_grad()
            loss.backward()
            for group in self.optimizer.param_groups:
                base = group.setdefault("base_lr", group["lr"])
                group["lr"] = base * (step + 1) / 8  # a learning-rate schedule
            self.optimizer.step()
        return self

    def save(self, root):
        trained = {f"transformer.{name}": value.detach().cpu() for name, value in self.parameters.items()}
        return checkpoint.write_checkpoint(
            root,
            checkpoint.snapshot(
                checkpoint.Position(3, 3, 1),
                write_adapter=lambda folder: save_file(trained, f"{folder}/{ADAPTER_FILE}"),
                optimizer=checkpoint.named_optimizer_state(self.optimizer),
                scaler={},
            ),
        )


def test_all_optimizers_are_tested():
    assert {choice.name for choice, _ in CHOICES.values()} == set(OPTIMIZERS.classes)


@each_choice
def test_it_learns(choice):
    toy = Toy(choice)
    first = toy.loss().item()
    for step in range(60):
        toy.steps(1, first=min(step, 7))
    assert toy.loss().item() < 0.95 * first


@each_choice
@pytest.mark.parametrize("before", [0, 2])
def test_a_step_without_gradients_changes_nothing(choice, before):
    """A step whose gradients are not finite is left out in this way."""
    toy = Toy(choice).steps(before)
    weights = {name: value.detach().clone() for name, value in toy.parameters.items()}
    state = copy.deepcopy(checkpoint.named_optimizer_state(toy.optimizer))
    toy.optimizer.zero_grad()
    toy.optimizer.step()
    assert all(weights[name].equal(value) for name, value in toy.parameters.items())
    after = checkpoint.named_optimizer_state(toy.optimizer)
    assert str(after["param_groups"]) == str(state["param_groups"])
    assert after["state"].keys() == state["state"].keys()
    for name, entry in state["state"].items():
        for field, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after["state"][name][field])), field


@each_choice
def test_it_resumes_bitwise_identically(choice, tmp_path):
    whole = Toy(choice).steps(6)
    Toy(choice).steps(3).save(tmp_path)
    resumed = Toy(choice, saved=checkpoint.newest(tmp_path)).steps(3, first=3)
    for name, parameter in whole.parameters.items():
        assert parameter.equal(resumed.parameters[name]), name
    assert choice.rate(whole.optimizer) == choice.rate(resumed.optimizer)


@each_choice
def test_a_restored_state_is_saved_again_unchanged(choice, tmp_path):
    """A resumed run writes the state again in its next checkpoint."""
    toy = Toy(choice).steps(3)
    first = toy.save(tmp_path / "first")
    again = Toy(choice, saved=checkpoint.newest(tmp_path / "first")).save(tmp_path / "again")
    for name in (ADAPTER_FILE, "optimizer.safetensors", "state.json"):
        assert (first / name).read_bytes() == (again / name).read_bytes(), name


@pytest.mark.parametrize(("choice", "numbers"), CHOICES.values(), ids=list(CHOICES))
def test_its_state_has_the_declared_size(choice, numbers):
    shapes = [(8, 256), (256, 8), (8, 250), (300,), (8, 256), (300,)]
    parameters = [(str(index), torch.nn.Parameter(torch.randn(shape))) for index, shape in enumerate(shapes)]
    optimizer = choice.build(parameters)
    for _, parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    held = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.dim() > 0  # counters aside
    }
    assert sum(held.values()) == choice.memory(shapes).state
    large = [(16, 3072), (3072, 16)]
    assert choice.memory(large).state / (4 * 2 * 16 * 3072) == pytest.approx(numbers, abs=0.07)


@each_choice
def test_dora_magnitudes_do_not_decay(choice):
    """They start at the norms of the base's rows, so decay towards zero would move them away from the base."""
    toy = Toy(choice.model_copy(update={"weight_decay": 0.5}))
    before = {name: parameter.detach().clone() for name, parameter in toy.parameters.items()}
    for step in range(4):
        for group in toy.optimizer.param_groups:
            assert (group["weight_decay"] == 0) == (MAGNITUDE in group["param_names"])
        a, magnitude, b = toy.parameters.values()
        a.grad, magnitude.grad, b.grad = (
            1e-12 * before["layer.lora_A"],
            torch.zeros(OUTPUTS),
            torch.ones_like(b),
        )
        toy.optimizer.step()
        assert torch.allclose(toy.parameters[MAGNITUDE], before[MAGNITUDE], rtol=1e-7), step
    assert toy.parameters["layer.lora_A"].norm() < before["layer.lora_A"].norm()


def test_adafactors_rate_does_not_depend_on_the_weights():
    """torch's default is relative to the weights, and B starts at zero."""
    toy = Toy(Adafactor(name="adafactor", lr=1e-2, weight_decay=0.0))
    toy.steps(1, first=7)
    moved = toy.parameters["layer.lora_B"].detach().square().mean().sqrt()
    assert 0.5e-2 < float(moved) <= 1.01e-2


def test_adafactor_reports_the_rate_it_used():
    choice = Adafactor(name="adafactor", lr=0.6, weight_decay=0.0)
    toy = Toy(choice)
    for step, rate in enumerate((0.6, 0.6, 3**-0.5, 4**-0.5), 1):
        before = toy.parameters["layer.lora_B"].detach().clone()
        toy.parameters["layer.lora_A"].grad = torch.zeros(RANK, INPUTS)
        toy.parameters[MAGNITUDE].grad = torch.zeros(OUTPUTS)
        toy.parameters["layer.lora_B"].grad = torch.full((OUTPUTS, RANK), (-1.0) ** step)
        toy.optimizer.step()
        assert choice.rate(toy.optimizer) == pytest.approx(rate)
        assert float((toy.parameters["layer.lora_B"].detach() - before).abs().mean()) == pytest.approx(
            rate, rel=1e-4
        )


def test_prodigy_estimates_its_rate_and_reports_it():
    choice = Prodigy(name="prodigy")
    toy = Toy(choice)
    toy.steps(1, first=7)
    assert choice.rate(toy.optimizer) == pytest.approx(1e-6, rel=1e-3)
    for _ in range(60):
        toy.steps(1, first=7)
    assert choice.rate(toy.optimizer) > 1e-4


def test_prodigy_warns_about_another_optimizers_rate(capsys):
    assert Prodigy(name="prodigy").advice() == []
    (line,) = Prodigy(name="prodigy", lr=1e-4).advice()
    assert "0.0001" in line
    assert "d_coef" in line
    assert AdamW(name="adamw").advice() == []
    Toy(Prodigy(name="prodigy", weight_decay=0.1))
    assert capsys.readouterr().out == ""


def test_schedule_free_swaps_its_average_in_and_trains_on():
    choice = ScheduleFreeAdamW(name="schedule_free_adamw", lr=3e-2)
    toy, undisturbed = Toy(choice).steps(4), Toy(choice).steps(4)
    weights = choice.weights(toy.parameters, toy.optimizer)
    assert isinstance(weights, OptimizerAverage)
    trained = {name: parameter.detach().clone() for name, parameter in toy.parameters.items()}
    with weights.swapped_in():
        for name, parameter in toy.parameters.items():
            # y = (1 - beta) z + beta x, x the average and y the weights that train (Defazio et al. 2024, eq.
            # 3)
            z = toy.optimizer.state[parameter]["z"]
            expected = (trained[name] - (1 - 0.9) * z) / 0.9
            assert torch.allclose(parameter, expected, atol=1e-6)
        assert not torch.allclose(toy.parameters["layer.lora_B"], trained["layer.lora_B"], atol=1e-4)
    toy.steps(2, first=4)
    undisturbed.steps(2, first=4)
    for name, parameter in toy.parameters.items():
        assert parameter.equal(undisturbed.parameters[name]), "swapping the average in changed the training"


def test_schedule_free_weights_the_average_by_the_warmup_rates():
    """A warm-up from our schedule equals the library's own: both weight the average by the rate."""
    ours = Toy(ScheduleFreeAdamW(name="schedule_free_adamw", lr=3e-2)).steps(8)
    theirs = Toy(ScheduleFreeAdamW(name="schedule_free_adamw", lr=3e-2))
    for group in theirs.optimizer.param_groups:
        group["warmup_steps"] = 8
    for _ in range(8):
        loss = theirs.loss()
        theirs.optimizer.zero_grad()
        loss.backward()
        theirs.optimizer.step()
    for one, other in zip(ours.parameters.values(), theirs.parameters.values(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.gpu
@each_choice
def test_cuda_takes_the_cpus_steps_and_resumes_bitwise_identically(choice, tmp_path):
    whole, cpu = Toy(choice, "cuda").steps(6), Toy(choice).steps(6)
    for one, other in zip(whole.parameters.values(), cpu.parameters.values(), strict=True):
        assert torch.allclose(one.cpu(), other, atol=5e-3)
    Toy(choice, "cuda").steps(3).save(tmp_path)
    resumed = Toy(choice, "cuda", checkpoint.newest(tmp_path)).steps(3, first=3)
    for name, parameter in whole.parameters.items():
        assert parameter.equal(resumed.parameters[name]), name
        assert math.isfinite(float(parameter.sum()))


@pytest.mark.gpu
@each_choice
def test_scaled_gradients_are_unscaled_first(choice):
    """As in float16 training: clipping sees unscaled gradients, and a step with infinite gradients is
    skipped."""
    scaled, plain = Toy(choice, "cuda"), Toy(choice, "cuda")
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    scaler.scale(scaled.loss()).backward()
    scaler.unscale_(scaled.optimizer)
    plain.loss().backward()
    for one, other in zip(scaled.parameters.values(), plain.parameters.values(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-7)
    scaler.step(scaled.optimizer)
    plain.optimizer.step()
    scaler.update()
    for one, other in zip(scaled.parameters.values(), plain.parameters.values(), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)
        one.grad = torch.full_like(one, float("inf"))
    before = [parameter.detach().clone() for parameter in scaled.parameters.values()]
    scaler.step(scaled.optimizer)
    assert all(p.equal(value) for p, value in zip(scaled.parameters.values(), before, strict=True))

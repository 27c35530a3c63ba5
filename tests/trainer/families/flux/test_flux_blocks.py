"""FLUX's blocks as one autograd function each: results, kept memory, and when they run layer by layer."""

import pytest
import torch
from diffusers import FluxTransformer2DModel

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.convert.replace_linears import convert
from halfbyte.quant.lora.linear_group import LinearGroup
from halfbyte.trainer.adapters.lora import add_lora, trained_parameters
from halfbyte.trainer.families.blocks.attention import JointAttention
from halfbyte.trainer.families.blocks.fused_block import BlockSettings
from halfbyte.trainer.families.blocks.parts import joined
from halfbyte.trainer.families.flux.blocks import fuse_flux_blocks
from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.families.offload.activations import HostStore
from halfbyte.trainer.plan.memory_tracker import LiveBytes

TEXTS, TOKENS = 6, 16


def denoiser(*, quant="nf4", targets=None, dropout=0.0, dtype=torch.float32, settings=None):
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    ).to(dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.RMSNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    model.requires_grad_(False)
    if quant is not None:
        convert(model, QuantRecipe(quant_type=quant, compute_dtype=dtype))
    targets = targets or Flux.target_presets["all-linear"]
    add_lora(model, rank=3, alpha=6, dropout=dropout, targets=targets, init="gaussian", seed=1)
    draws = torch.Generator().manual_seed(7)
    for name, parameter in trained_parameters(model).items():
        if ".lora_B." in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=draws))
    fuse_flux_blocks(model, settings or BlockSettings())
    return model.train()


def inputs(batch=2, dtype=torch.float32):
    draws = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(shape, generator=draws).to(dtype)

    rows = torch.arange(TOKENS) // 4
    return {
        "hidden_states": noise(batch, TOKENS, 16),
        "encoder_hidden_states": noise(batch, TEXTS, 32),
        "pooled_projections": noise(batch, 16),
        "timestep": torch.full((batch,), 0.5, dtype=dtype),
        "img_ids": torch.stack((torch.zeros(TOKENS), rows, torch.arange(TOKENS) % 4), dim=-1),
        "txt_ids": torch.zeros(TEXTS, 3),
        "return_dict": False,
    }


def step(model, **settings):
    output = model(**inputs(**settings))[0]
    parameters = trained_parameters(model)
    return output, dict(
        zip(parameters, torch.autograd.grad(output.square().sum(), list(parameters.values())), strict=True)
    )


def functions(model):
    """Returns the names of all autograd nodes that led to the model's output."""
    output = model(**inputs())[0]  # torch 2.11 frees the graph with it
    seen, waiting, names = set(), [output.grad_fn], []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.append(node.name())
        waiting += [parent for parent, _ in node.next_functions]
    return names


@pytest.mark.parametrize("keep", ["inputs", "attention", "everything"])
@pytest.mark.parametrize("quant", ["nf4", None])
def test_fused_blocks_equal_the_layers_one_by_one(quant, keep):
    expected, expected_grads = step(denoiser(quant=quant, settings=BlockSettings(whole=False)))
    model = denoiser(quant=quant, settings=BlockSettings(keep))
    names = functions(model)
    assert names.count("DualBlockFunctionBackward") == names.count("SingleBlockFunctionBackward") == 2
    output, grads = step(model)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    for name, wanted in expected_grads.items():
        assert (grads[name] - wanted).norm() <= 1e-4 * wanted.norm(), name


@pytest.mark.parametrize("keep", ["inputs", "attention", "everything"])
def test_a_trained_modulation_gets_its_gradients(keep):
    targets = r"(single_)?transformer_blocks\.\d+\.(norm(1|1_context)?\.linear|attn\.to_q)"
    expected, expected_grads = step(denoiser(targets=targets, settings=BlockSettings(whole=False)))
    model = denoiser(targets=targets, settings=BlockSettings(keep))
    assert "SingleBlockFunctionBackward" in functions(model)
    output, grads = step(model)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert sum(".norm" in name for name in grads) == 12
    for name, wanted in expected_grads.items():
        assert (grads[name] - wanted).norm() <= 1e-4 * wanted.norm(), name


def test_memory_kept_between_the_passes():
    kept = {}
    for keep in ("inputs", "attention", "everything"):
        model = denoiser(settings=BlockSettings(keep))
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: (s.append(t), t)[1], lambda t: t):
            model(**inputs())
        width = 64
        streams = [tensor for tensor in saved if tensor.dim() > 1 and tensor.numel() >= 2 * TEXTS * width]
        kept[keep] = sum(tensor.numel() for tensor in streams) / (2 * (TEXTS + TOKENS) * width)
    # In units of one stream (B, T + S, D): two dual blocks, two single blocks, and a rest for the last norm
    # and layer.
    tail = kept["inputs"] - 4
    assert 0 <= tail < 3
    assert kept["attention"] - tail == pytest.approx(4 + 4 + 2, abs=0.2)
    # In addition: queries, keys and values (3 D) and the MLP's hidden units (4 D).
    assert kept["everything"] - kept["attention"] == pytest.approx(4 * 7, abs=0.2)


@pytest.mark.parametrize("keep", ["inputs", "attention", "everything"])
def test_layers_without_adapters_do_not_keep_their_inputs(keep):
    held = {}
    for targets in ("all-linear", "attention"):
        model = denoiser(targets=Flux.target_presets[targets], settings=BlockSettings(keep))
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: (s.append(t), t)[1], lambda t: t):
            model(**inputs())
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in saved}
        held[targets] = sum(storage.nbytes() for storage in storages.values())
    assert held["attention"] <= held["all-linear"]


@pytest.mark.parametrize(
    ("keep", "products", "attentions"),
    [("inputs", 2 * 6 + 2, 4), ("attention", 2 * 4 + 2, 0), ("everything", 0, 0)],
)
def test_kept_activations_are_not_recomputed(monkeypatch, keep, products, attentions):
    calls = []
    for owner, name in ((LinearGroup, "forward"), (JointAttention, "attend")):
        own = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, own=own, name=name: calls.append(name) or own(*given))
    output = denoiser(settings=BlockSettings(keep))(**inputs())[0]
    calls.clear()
    output.sum().backward()
    # A dual block recomputes the products into attention and into the MLP in both streams, with attention
    # also those out of attention.
    assert (calls.count("forward"), calls.count("attend")) == (products, attentions)


@pytest.mark.parametrize("aside", ["dropout", "int8", "hook", "pre_hook", "forward", "kwargs"])
def test_a_block_that_cannot_be_fused_runs_layer_by_layer(aside):
    model = denoiser(
        dropout=0.5 if aside == "dropout" else 0.0,
        quant="int8" if aside == "int8" else "nf4",
        settings=BlockSettings("inputs"),
    )
    if aside == "hook":
        calls = []
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            block.attn.to_q.base_layer.register_forward_hook(lambda *_: calls.append(1))
    if aside in ("pre_hook", "forward"):
        calls = []
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            if aside == "pre_hook":
                block.attn.register_forward_pre_hook(lambda *_: calls.append(1))
            else:
                # The way accelerate installs its hooks.
                own = block.attn.forward
                block.attn.forward = lambda *given, own=own, **named: calls.append(1) or own(*given, **named)
    arguments = inputs()
    if aside == "kwargs":
        arguments["joint_attention_kwargs"] = {"attention_mask": None}
    output = model(**arguments)[0]
    names = []
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        names.append(node.name())
        waiting += [parent for parent, _ in node.next_functions if parent is not None][:1]
    assert not any("BlockFunction" in name for name in names)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in trained_parameters(model).values())
    if aside in ("hook", "pre_hook", "forward"):
        assert len(calls) == 8  # four blocks, once in the forward and once when the checkpoint recomputes it


def test_a_second_backward_gives_the_same_gradients():
    model = denoiser(settings=BlockSettings("attention"))
    output = model(**inputs())[0]
    parameters = list(trained_parameters(model).values())
    first = torch.autograd.grad(output.sum(), parameters, retain_graph=True)
    again = torch.autograd.grad(output.sum(), parameters)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_autocast_sets_the_dtype():
    model = denoiser(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert "DualBlockFunctionBackward" in functions(model)
        output, grads = step(model, dtype=torch.float32)
    assert output.dtype == torch.bfloat16
    assert {grad.dtype for grad in grads.values()} == {torch.float32}


@pytest.mark.parametrize("batch", [1, 3])
def test_streams_next_to_each_other_in_memory_are_joined_without_a_copy(batch):
    whole = torch.randn(batch, 10, 4)
    first, second = whole[:, :3], whole[:, 3:]
    assert joined(first, second).data_ptr() == whole.data_ptr()
    assert torch.equal(joined(first, second), whole)
    for one, other in ((first.clone(), second), (second, first), (whole[:, :3], whole[:, 4:])):
        together = joined(one, other)
        assert torch.equal(together, torch.cat((one, other), dim=1))
        assert together.data_ptr() not in (one.data_ptr(), other.data_ptr())


def test_without_gradients_the_output_has_no_graph():
    model = denoiser()
    with torch.no_grad():
        expected = model(**inputs())[0]
    torch.testing.assert_close(model(**inputs())[0], expected)
    assert expected.grad_fn is None


def test_without_gradients_nothing_is_kept_for_a_backward():
    peaks = {}
    for keep in ("inputs", "everything"):
        model, arguments = denoiser(settings=BlockSettings(keep)), inputs()
        live = LiveBytes("cpu")
        live.hold([*model.parameters(), *model.buffers()], "weights")
        with live, torch.no_grad():
            model(**arguments)
        peaks[keep] = live.peak.nbytes
    assert peaks["everything"] == peaks["inputs"]


def test_inputs_are_offloaded_only_if_a_backward_follows():
    store = HostStore()
    model = denoiser(settings=BlockSettings("inputs", store=store))
    sent = []
    store.put = lambda stream, put=store.put: sent.append(stream.shape) or put(stream)
    with torch.no_grad():
        model(**inputs())
    assert sent == []
    expected, _ = step(denoiser(settings=BlockSettings("inputs")))
    assert torch.equal(step(model)[0], expected)
    assert len(sent) == 2 * 2 + 2  # two streams of each dual block, one of each single block

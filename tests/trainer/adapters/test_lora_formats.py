"""The files for ComfyUI and kohya: names, shapes, and the dense update they represent."""

import json

import pytest
import torch
from safetensors.torch import load_file

from halfbyte.trainer.adapters.formats import formats_for, fused_layers, named_formats, write_formats
from halfbyte.trainer.adapters.saved import ADAPTER_FILE, LoraLayer, SavedAdapter, read_saved
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.flux.names import flux_names
from halfbyte.trainer.families.sd3.names import sd3_names
from halfbyte.trainer.pretrained.layer_names import swap_halves

WIDTH = 8
FLUX = {
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "guidance_embeds": True,
}
SD3 = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2, "dual_attention_layers": [0]}


def layer(rank, outputs, scale, seed):
    draws = torch.Generator().manual_seed(seed)
    return LoraLayer(
        torch.randn(rank, WIDTH, generator=draws), torch.randn(outputs, rank, generator=draws), scale
    )


def dense(one):
    return one.scale * one.up.double() @ one.down.double()


@pytest.mark.parametrize("scales", [(2.0, 2.0, 2.0, 2.0), (2.0, 0.5, 1.0, 3.0)])
def test_a_fused_layer_is_exact_with_the_sum_of_the_ranks(scales):
    block = "single_transformer_blocks.0"
    parts = [f"{block}.attn.to_q", f"{block}.attn.to_k", f"{block}.attn.to_v", f"{block}.proj_mlp"]
    sizes = (WIDTH, WIDTH, WIDTH, 4 * WIDTH)
    layers = {
        part: layer(rank, size, scale, rank)
        for part, rank, size, scale in zip(parts, (3, 2, 4, 1), sizes, scales, strict=True)
    }
    fused = fused_layers(layers, flux_names(FLUX))
    assert list(fused) == ["single_blocks.0.linear1"]
    assert fused["single_blocks.0.linear1"].rank == 10
    expected = torch.cat([dense(layers[part]) for part in parts])
    torch.testing.assert_close(dense(fused["single_blocks.0.linear1"]), expected)
    if len(set(scales)) == 1:
        assert fused["single_blocks.0.linear1"].scale == 2.0


def test_parts_without_adapter_are_zero_in_the_fused_layer():
    one = layer(3, WIDTH, 1.0, 0)
    (fused,) = fused_layers({"transformer_blocks.0.attn.to_k": one}, sd3_names(SD3)).values()
    update = dense(fused)
    assert update.shape == (3 * WIDTH, WIDTH)
    torch.testing.assert_close(update[WIDTH : 2 * WIDTH], dense(one))
    assert not update[:WIDTH].any()
    assert not update[2 * WIDTH :].any()


def test_modulations_with_swapped_halves_are_swapped_back():
    one = layer(2, 2 * WIDTH, 1.0, 0)
    for names in (flux_names(FLUX), sd3_names(SD3)):
        fused = fused_layers({"norm_out.linear": one}, names)["final_layer.adaLN_modulation.1"]
        torch.testing.assert_close(dense(fused), swap_halves(dense(one)))
    name = "transformer_blocks.{}.norm1_context.linear"
    fused = fused_layers({name.format(0): one, name.format(1): one}, sd3_names(SD3))
    first, last = (fused[f"joint_blocks.{number}.context_block.adaLN_modulation.1"] for number in (0, 1))
    torch.testing.assert_close(dense(first), dense(one))
    torch.testing.assert_close(dense(last), swap_halves(dense(one)))


def test_a_layer_without_counterpart_is_named():
    with pytest.raises(RecipeError, match=r"format: other\.layer .*--format diffusers"):
        fused_layers({"other.layer": layer(2, WIDTH, 1.0, 0)}, flux_names(FLUX))


@pytest.fixture
def adapter():
    one = layer(4, WIDTH, 1.0, 0)
    tensors = {"x_embedder.lora_A.weight": one.down, "x_embedder.lora_B.weight": one.up}
    return SavedAdapter(tensors, {"r": 4, "lora_alpha": 2, "peft_type": "LORA"})


def test_alpha_carries_the_scale(adapter, tmp_path):
    write_formats(adapter, ("comfyui", "kohya"), tmp_path, tuple(flux_names(FLUX)), name="dog", base=None)
    for file, key in (("comfyui", "diffusion_model.img_in"), ("kohya", "lora_unet_img_in")):
        tensors = load_file(tmp_path / file / "dog.safetensors")
        assert tensors.keys() == {f"{key}.lora_down.weight", f"{key}.lora_up.weight", f"{key}.alpha"}
        assert tensors[f"{key}.alpha"].item() == 2


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"lora_alpha": 2}, 0.5),
        ({"lora_alpha": 2, "use_rslora": True}, 1.0),
        ({"lora_alpha": 2, "alpha_pattern": {"other": 1, "x_emb.*": 8}}, 2.0),
    ],
)
def test_the_scale_equals_pefts(adapter, config, expected):
    assert SavedAdapter(adapter.tensors, config).layers()["x_embedder"].scale == expected


def test_pefts_folder_names_its_base(adapter, tmp_path):
    write_formats(
        adapter, ("diffusers",), tmp_path, tuple(flux_names(FLUX)), name="dog", base=("owner/flux", "c0ffee")
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/flux", "c0ffee")
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert names == {f"base_model.model.{name}" for name in adapter.tensors}


def test_dora_is_written_only_for_diffusers(adapter):
    magnitude = {"x_embedder.lora_magnitude_vector": torch.ones(WIDTH)}
    dora = SavedAdapter({**adapter.tensors, **magnitude}, adapter.config)
    assert formats_for(dora, None) == ("diffusers",)
    assert formats_for(adapter, None) == ("diffusers", "comfyui", "kohya")
    with pytest.raises(RecipeError, match="DoRA"):
        formats_for(dora, ("kohya",))


def test_formats_are_separated_by_commas():
    assert named_formats("kohya, diffusers") == ("kohya", "diffusers")
    with pytest.raises(RecipeError, match=r"'webui'.*diffusers, comfyui, kohya"):
        named_formats("diffusers,webui")


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", None])
def test_a_file_that_is_not_an_adapter_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / ADAPTER_FILE).write_bytes(content)
    with pytest.raises(RecipeError, match=rf"{ADAPTER_FILE}: .*safetensors"):
        read_saved(tmp_path / ADAPTER_FILE)

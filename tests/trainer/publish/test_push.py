"""Tests `halfbyte push` with the real client against a loopback Hub, and loads the result with stock libraries."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

from huggingface_hub import ModelCard
from PIL import Image

from hub_runs import BASE, TOKEN
from repository import ROOT
from runs import environment


def test_a_finished_run_is_pushed_to_a_private_repository_in_one_commit(hub, pushed_run):
    repository = hub.store.model("ann/dog")
    assert repository.private
    assert len(repository.commits) == 2, "the Hub's first commit, and ours"
    assert set(repository.tree) == {
        ".gitattributes",
        "README.md",
        "halfbyte.json",
        "pytorch_lora_weights.safetensors",
        "adapter_model.safetensors",
        "adapter_config.json",
        "comfyui/dog.safetensors",
        "kohya/dog.safetensors",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer/quantization_error.json",
        *(f"samples/0{place}{kind}.png" for place in range(2) for kind in ("", "-base")),
    }
    for name, local in (
        ("pytorch_lora_weights.safetensors", "adapter/pytorch_lora_weights.safetensors"),
        ("transformer/diffusion_pytorch_model.safetensors",) * 2,
        ("samples/01.png", "samples/step-000004-01.png"),
        ("samples/01-base.png", "samples/step-000000-01.png"),
    ):
        assert repository.tree[name].content == (pushed_run / local).read_bytes()


def test_the_token_is_in_no_file(hub, pushed_run):
    """The worker has trained and pushed: neither its files nor its log nor the repository has the token."""
    held = [path for path in hub.folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert held == []
    assert (pushed_run / "recipe.yaml").is_file()
    assert pushed_run.is_relative_to(hub.folder)
    assert TOKEN not in hub.worker.stderr.read_text()
    tree = hub.store.model("ann/dog").tree
    assert [name for name, blob in tree.items() if TOKEN.encode() in blob.content] == []
    assert hub.hub.leaks == [], "requests with the token in the address or the body"
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            shown = (process / "cmdline").read_bytes() + (process / "comm").read_bytes()
            assert TOKEN.encode() not in shown, f"in the arguments or the title of process {process.name}"


def test_metadata_and_card_pin_the_base(hub, pushed_run):
    tree, commit = hub.store.model("ann/dog").tree, hub.store.model(BASE).head
    for name, key in (("adapter_config.json", "revision"), ("halfbyte.json", "revision")):
        assert json.loads(tree[name].content)[key] == commit
    data = ModelCard(tree["README.md"].content.decode()).data
    assert (data["base_model"], data["base_model_revision"]) == (BASE, commit)
    assert data["license_link"] == f"https://huggingface.co/{BASE}/blob/{commit}/LICENSE.md"
    assert f'revision="{commit}"' in tree["README.md"].content.decode()


def test_a_second_push_sends_nothing_and_a_change_is_one_more_commit(hub, pushed_run):
    repository = hub.store.model("ann/dog")
    before, seen = len(repository.commits), len(hub.hub.faults.requests)
    answer = hub.worker.run("push", str(pushed_run))
    assert (answer.code, "up to date" in answer.output) == (0, True), answer.output
    assert len(repository.commits) == before
    methods = [request.split()[0] for request in hub.hub.faults.requests[seen:]]
    assert methods == ["GET"] * 3 + ["HEAD", "GET"], "login, repository, list of files, and halfbyte.json"
    gone = [pushed_run / name for name in ("samples/step-000004-01.png", "adapter/adapter_config.json")]
    kept = {path: path.read_bytes() for path in gone}
    try:
        for path in gone:
            path.unlink()
        answer = hub.worker.run("push", str(pushed_run))
        assert "pushed 2 files" in answer.output, (
            answer.output
        )  # the card, and halfbyte.json with the digests
        assert "3 deleted" in answer.output
        assert not {"samples/01.png", "samples/01-base.png", "adapter_config.json"} & set(repository.tree)
        assert len(repository.commits) == before + 1
    finally:
        for path, content in kept.items():
            path.write_bytes(content)
        assert hub.worker.run("push", str(pushed_run)).code == 0


USE = """
import re, sys
from peft import PeftConfig
from judge import stock_bitsandbytes_on_cpu
from huggingface_hub import hf_hub_download
card = open(hf_hub_download(sys.argv[1], "README.md"), encoding="utf-8").read()
(code,) = re.findall(r"^```python\\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
# diffusers rejects bitsandbytes without a GPU, but bitsandbytes itself runs on the CPU.
with stock_bitsandbytes_on_cpu():
    exec(compile(code, "the card's sample", "exec"))
print(PeftConfig.from_pretrained(sys.argv[1]).base_model_name_or_path)
plain = FluxPipeline.from_pretrained(sys.argv[2], torch_dtype=torch.float32)
plain.load_lora_weights(sys.argv[1])
assert plain.transformer.transformer_blocks[0].attn.to_q.scaling == {"default_0": 1.0}
assert pipeline.get_active_adapters() == ["default_0"]
assert type(pipeline.transformer.transformer_blocks[0].ff.net[2].base_layer).__module__.startswith("bitsandbytes")
"""


def elsewhere(hub, folder, program, *arguments):
    """Runs a program as on another machine: logged in, with nothing of the run."""
    env = environment() | {
        "HF_ENDPOINT": hub.hub.endpoint,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
        "PYTHONPATH": str(ROOT / "tests" / "support"),
    }
    del env["HF_HUB_OFFLINE"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_stock_libraries_load_it_by_name_and_the_cards_code_repeats_the_runs_sample(
    hub, pushed_run, tmp_path
):
    assert elsewhere(hub, tmp_path, USE, "ann/dog", BASE).split()[-1] == BASE
    generated, expected = (
        Image.open(path).convert("RGB")
        for path in (tmp_path / "image.png", pushed_run / "samples" / "step-000004-00.png")
    )
    base = Image.open(pushed_run / "samples" / "step-000000-00.png").convert("RGB")
    assert distance(generated, expected) < 1.0
    assert distance(base, expected) > 3.0, "the image does not depend on the adapter"


def distance(image, other):
    """Mean absolute difference of all color values, on a scale of 0 to 255."""
    pairs = zip(image.tobytes(), other.tobytes(), strict=True)
    return sum(abs(a - b) for a, b in pairs) / len(image.tobytes())

"""Tests the sources of pipelines: local folders, and a loopback Hub that the real client talks to."""

import json
import shutil
import subprocess
import sys

import pytest

from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.pretrained.file_digests import FileDigests
from halfbyte.trainer.pretrained.pipeline import resolve

from loopback_hub import COMMIT, hub
from runs import environment

COMPONENTS = ("transformer", "vae", "scheduler")

# Runs in a separate process, because the client reads its endpoint when it is imported.
ASK = """
import json, sys, time
from halfbyte.trainer.errors import HubError
from halfbyte.trainer.pretrained.pipeline import resolve
time.sleep = lambda seconds: None
answers = []
for name, revision in json.loads(sys.argv[1]):
    try:
        source = resolve(name, revision, ("transformer", "vae", "scheduler"), "FluxTransformer2DModel")
        files = sorted(p.relative_to(source.folder).as_posix() for p in source.folder.rglob("*") if p.is_file())
        answers.append([source.revision, files])
    except HubError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def ask(tmp_path, endpoint, questions):
    env = environment() | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    env.pop("HF_HUB_OFFLINE")
    result = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(questions)],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_the_hub_provides_components_and_errors_name_the_problem(tmp_path, mini_flux):
    folder = tmp_path / "repository"
    shutil.copytree(mini_flux, folder)
    (folder / "flux1-dev.safetensors").write_bytes(b"24 GB that nobody needs")
    (folder / "transformer" / "weights.bin").write_bytes(b"a pickle")
    (folder / "vae" / "model.fp16-00001-of-00002.safetensors").write_bytes(b"the same in fp16")
    with hub({"we/flux": folder, "we/gated": folder}, gated={"we/gated"}) as (endpoint, requested):
        questions = [
            ["we/flux", None],
            ["we/none", None],
            ["we/flux", "v9"],
            ["we/gated", None],
            ["we/flux", COMMIT],
        ]
        found, absent, no_revision, gated, pinned = ask(tmp_path, endpoint, questions)
        needless = ("flux1-dev", "weights.bin", "fp16")
        unneeded = [request for request in requested if any(name in request for name in needless)]
    assert found[0] == COMMIT
    assert "model_index.json" in found[1]
    assert {file.split("/")[0] for file in found[1]} == {"model_index.json", *COMPONENTS}
    assert not unneeded, "only files that training reads are downloaded"
    assert "no repository we/none" in absent
    assert "'v9'" in no_revision
    assert "gated" in gated
    assert pinned == found
    # The server has stopped, and the client's cache is still used.
    again, never_seen = ask(tmp_path, endpoint, [["we/flux", None], ["we/other", None]])
    assert again == found
    assert never_seen.startswith("downloading we/other: ")
    assert f"{endpoint} (ConnectError)" in never_seen


def open_flux(folder):
    return resolve(str(folder), None, COMPONENTS, "FluxTransformer2DModel")


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "model_index.json"),
        (lambda folder: (folder / "model_index.json").write_text("{"), r"model_index\.json: .*JSON"),
        (lambda folder: shutil.rmtree(folder / "vae"), "model: vae missing;"),
        (lambda folder: (folder / "vae" / "config.json").unlink(), "model: vae missing;"),
        (
            lambda folder: [f.unlink() for f in (folder / "transformer").glob("*.safetensors")],
            "model: transformer missing;",
        ),
    ],
)
def test_a_folder_that_is_not_a_pipeline_is_rejected(tmp_path, mini_flux, damage, fragment):
    folder = tmp_path / "model"
    shutil.copytree(mini_flux, folder)
    damage(folder)
    with pytest.raises(RecipeError, match=fragment):
        open_flux(folder)


def test_the_error_for_a_package_names_the_pipeline_it_was_made_from(tmp_path, mini_flux):
    shutil.copytree(mini_flux / "transformer", tmp_path / "package" / "transformer")
    config = tmp_path / "package" / "transformer" / "config.json"
    facts = json.loads(config.read_text())
    for made_from, is_named in (("we/flux", True), ("/home/flux", False)):
        config.write_text(json.dumps(facts | {"_name_or_path": made_from}))
        with pytest.raises(RecipeError, match=r"model\.transformer: .*/package, .*model\.path") as failure:
            open_flux(tmp_path / "package")
        assert str(failure.value).endswith(": we/flux") == is_named
        assert "/home/flux" not in str(failure.value)


def test_a_fingerprint_changes_only_with_the_files(tmp_path, mini_flux):
    folder, memo = tmp_path / "model", FileDigests(tmp_path / "memo")
    shutil.copytree(mini_flux, folder)
    first = open_flux(folder).fingerprint(["vae"], memo)
    (folder / "transformer" / "config.json").touch()
    (folder / "vae" / ".DS_Store").write_bytes(b"a file manager's")
    assert open_flux(folder).fingerprint(["vae"], memo) == first
    shutil.copytree(folder, tmp_path / "copy")
    assert open_flux(tmp_path / "copy").fingerprint(["vae"], memo) == first
    weights = next((folder / "vae").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert open_flux(folder).fingerprint(["vae"], memo) != first

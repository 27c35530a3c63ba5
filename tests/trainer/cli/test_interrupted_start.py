"""Tests Ctrl-C while a command is still importing its libraries."""

import subprocess
import sys

import pytest

from runs import environment

# Sends Ctrl-C to its own process when the import of this module starts. A process that is started in the background
# of a shell without job control ignores Ctrl-C, and so would this one if the tests run there.
INTERRUPTED_AT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
def interrupt(event, details):
    if event == "import" and details[0] == {module!r}:
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(interrupt)
sys.argv = {arguments!r}
{start}
"""
STARTS = {
    "train": ("from halfbyte.trainer.cli.main import train; train()", ["train", "run.yaml"]),
    "halfbyte": ("from halfbyte.trainer.cli.main import main; main()", ["halfbyte", "quant-report", "model"]),
    "module": (
        "import runpy; runpy.run_module('halfbyte.trainer', run_name='__main__', alter_sys=True)",
        ["train", "run.yaml"],
    ),
}


# numpy's import does not pass KeyboardInterrupt on, and Lightning is imported after the command has started.
@pytest.mark.parametrize(
    ("start", "module"),
    [
        ("train", "torch"),
        ("train", "numpy._core._multiarray_umath"),
        ("train", "halfbyte.trainer.recipe.recipe"),
        ("module", "torch.nn"),
        ("halfbyte", "torch.nn"),
        ("halfbyte", "lightning.pytorch"),
    ],
)
def test_ctrl_c_during_imports_ends_with_one_line(start: str, module: str) -> None:
    code, arguments = STARTS[start]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_AT.format(module=module, arguments=arguments, start=code)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")

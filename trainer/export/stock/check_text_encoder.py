"""Checks that stock transformers loads an exported T5, as a program that imports nothing of halfbyte.

    python -P check_text_encoder.py JOB.json

`check_transformer.py` does the same for the transformer and its adapter.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import T5EncoderModel

_SHOWN = 5


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    answer: dict[str, Any] = {"failures": [], "checked": []}
    expected = load_file(job["expected"])
    model, info = T5EncoderModel.from_pretrained(
        job["folder"], dtype=torch.bfloat16, device_map={"": job["device"]}, output_loading_info=True
    )
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        answer["failures"].append(
            f"T5: {len(wrong)} keys are missing, unexpected or of the wrong shape:"
            f" {', '.join(map(str, wrong[:_SHOWN]))}"
        )
    packed = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    if not packed:
        answer["failures"].append("T5: no layer is a bitsandbytes layer")
    for module in packed:
        # In eval mode, bitsandbytes repacks weights in place on some CPUs and rounds differently.
        module.train()
    with torch.no_grad():
        theirs = model(expected["tokens"].to(job["device"]))[0].float().cpu()
    error = float((theirs - expected["text"]).norm() / expected["text"].norm())
    result = f"differs by {error:.1g} from ours in bf16, bound {job['bound']:g}"
    if not error <= job["bound"]:
        answer["failures"].append(f"T5: its encoding {result}")
    elif not answer["failures"]:
        answer["checked"].append(f"T5: loaded by stock transformers; its encoding {result}")
    ours = sorted(name for name in sys.modules if name.partition(".")[0] == "halfbyte")
    if ours:
        answer["failures"].append(f"the check imported {ours[0]} of halfbyte, so its result is not valid")
    Path(job["answer"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])

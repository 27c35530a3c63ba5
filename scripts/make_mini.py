"""Write a complete tiny pipeline: .venv/bin/python scripts/make_mini.py {flux,sd3} FOLDER [--seed N]."""

import argparse
from pathlib import Path

from halfbyte.trainer.mini import build_flux_pipeline, build_sd3_pipeline

BUILDERS = {"flux": build_flux_pipeline, "sd3": build_sd3_pipeline}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=BUILDERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pipeline = BUILDERS[arguments.kind](arguments.seed)
    pipeline.save_pretrained(arguments.folder)


if __name__ == "__main__":
    main()

"""Entry point of `python -m halfbyte.trainer RECIPE`, which accelerate launch and torchrun use."""

from halfbyte.trainer.cli.main import train

if __name__ == "__main__":
    train()

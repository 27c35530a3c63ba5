"""`python -m halfbyte.trainer RECIPE`, the form that accelerate launch and torchrun take."""

from halfbyte.trainer.cli.main import train

if __name__ == "__main__":
    train()

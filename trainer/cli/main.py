"""Entry points of the `train` and `halfbyte` scripts.

Some imports take seconds, torch most of all. They run inside `exit_on_interrupt`, so Ctrl-C ends the command
with one line and exit code 130 while it is still importing.
"""

from halfbyte.trainer.cli.interrupts import exit_on_interrupt


def train() -> None:
    """Runs the `train` script."""
    with exit_on_interrupt():
        from halfbyte.trainer.cli.app import train_app
    train_app()


def main() -> None:
    """Runs the `halfbyte` script."""
    with exit_on_interrupt():
        from halfbyte.trainer.cli.app import app
    app()

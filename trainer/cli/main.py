"""The entry points: `train RECIPE [key=value ...]`, and `halfbyte` with everything else.

What takes seconds to import, torch above all, is imported where Ctrl-C ends the command as it does later on.
"""

from halfbyte.trainer.cli.interrupts import ended_at_once


def train() -> None:
    """The `train` script."""
    with ended_at_once():
        from halfbyte.trainer.cli.app import train_app
    train_app()


def main() -> None:
    """The `halfbyte` script."""
    with ended_at_once():
        from halfbyte.trainer.cli.app import app
    app()

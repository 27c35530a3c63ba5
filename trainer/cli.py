"""The entry points: `train RECIPE [key=value ...]`, and `halfbyte` with everything else.

What takes seconds to import, torch above all, is imported where Ctrl-C ends the command as it does later on.
"""

from halfbyte.trainer.interrupts import ended_at_once


def train() -> None:
    """The `train` script."""
    with ended_at_once():
        from halfbyte.trainer.commands import train_app
    train_app()


def main() -> None:
    """The `halfbyte` script."""
    with ended_at_once():
        from halfbyte.trainer.commands import app
    app()

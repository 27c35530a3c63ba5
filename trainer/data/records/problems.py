"""Collects what is wrong with a data set, so that one message lists all of it."""

from dataclasses import dataclass, field

from halfbyte.trainer.wording import printable

MOST_LINES = 50
"""The most problems that one message lists."""


@dataclass
class Problems:
    """Collects problems, so that the user can fix them in one go. Lists the first and counts the others."""

    lines: list[str] = field(default_factory=list)
    more: int = 0  # problems without a line
    most: int | None = MOST_LINES  # lines; None: all

    def add(self, where: object, what: str) -> None:
        """Adds the line `where: what`, with control characters escaped."""
        if len(self.lines) == self.most:
            self.more += 1
        else:
            self.lines.append(f"{printable(where)}: {printable(what)}")

    def __len__(self) -> int:
        return len(self.lines) + self.more

    def __str__(self) -> str:
        return "\n".join(self.lines + ([f"... and {self.more} more like these"] if self.more else []))

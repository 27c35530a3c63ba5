"""What goes wrong with a request to the loopback Hub, and with which."""

import re
from dataclasses import dataclass, field

# A status; "page": a gateway's, in HTML; "stall": no answer for long; "drop": none to a request that is not done;
# "lose": none to one that is; "cut": half of an answer's body.
Kind = int | str


@dataclass
class Faults:
    """Counts requests, and says which of them goes wrong and how."""

    kind: Kind | None = None
    at: int = -1  # the request, counted from 0
    again: bool = False  # also every later request with the same method and path
    headers: dict[str, str] = field(default_factory=dict)  # of a refusal
    requests: list[str] = field(default_factory=list)  # "METHOD path", as they come
    met: str | None = None

    def of(self, request: str) -> Kind | None:
        """What happens to this request."""
        number = len(self.requests)
        self.requests.append(request)
        if number == self.at:
            self.met = request
            return self.kind
        return self.kind if self.again and request == self.met else None


@dataclass
class Matching(Faults):
    """As `Faults`, of the first request that a pattern fits: downloads ask for files in any order."""

    pattern: str = ""

    def of(self, request: str) -> Kind | None:
        """What happens to this request."""
        if self.met is None and re.search(self.pattern, request):
            self.at = len(self.requests)
        return super().of(request)

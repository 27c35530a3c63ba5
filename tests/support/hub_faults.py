"""Faults of the loopback Hub: which request fails, and how."""

import re
from dataclasses import dataclass, field

# An HTTP status, or one of: "page", an HTML error page of a gateway; "stall", no response for a long time;
# "drop", no response, and the request is not carried out; "lose", no response, but the request is carried
# out; "cut", only half of the response's body.
Kind = int | str


@dataclass
class Faults:
    """Counts requests and decides which of them fails, and how."""

    kind: Kind | None = None
    at: int = -1  # the number of the request that fails, counted from 0
    again: bool = False  # later requests with the same method and path fail, too
    headers: dict[str, str] = field(default_factory=dict)  # added to an error response
    requests: list[str] = field(default_factory=list)  # "METHOD path" of all requests so far
    met: str | None = None  # the request that failed

    def of(self, request: str) -> Kind | None:
        """Records the request and returns its fault, if any."""
        number = len(self.requests)
        self.requests.append(request)
        if number == self.at:
            self.met = request
            return self.kind
        return self.kind if self.again and request == self.met else None


@dataclass
class Matching(Faults):
    """Faults for the first request that matches a pattern, because downloads request files in any order."""

    pattern: str = ""

    def of(self, request: str) -> Kind | None:
        """Records the request and returns its fault, if any."""
        if self.met is None and re.search(self.pattern, request):
            self.at = len(self.requests)
        return super().of(request)

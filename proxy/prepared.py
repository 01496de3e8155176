"""A call that is checked, priced and held: what the relays and attempts work on.

Must not: hold what changes while the call runs (`proxy.live_session` does).
"""

from __future__ import annotations

import msgspec

from metering.prompt import PromptKind
from providers.retry import RetryPolicy
from proxy.candidates import Candidate, Route
from proxy.request import ChatRequest


class SessionEnded(Exception):
    """The session was ended from outside (client gone, lease lost, shutdown) while an attempt ran."""


class PreparedCall(msgspec.Struct, frozen=True):
    """A checked, priced and held request, and the candidates to try, best first. `output_limit` is what the hold covers
    of each choice's output where the call cannot be metered in flight, else None. `continuable`: a stream of one
    choice, on a route that continues streams."""

    request: ChatRequest
    route: Route
    prompt_tokens: int
    prompt_kind: PromptKind
    output_limit: int | None
    plan: tuple[Candidate, ...]
    continuable: bool = False

    @property
    def policy(self) -> RetryPolicy:
        """How often, and until when, it is tried."""
        return self.route.policy if self.request.stream else self.route.whole_policy

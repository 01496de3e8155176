"""What a provider's stream or answer says of its tokens, brought to the session's meter.

Must not: decide who pays, or end a session.
"""

from __future__ import annotations

from metering.meter import Channel, Meter
from metering.pricing import TokenUsage
from providers.events import Chunk, ReportedUsage
from proxy import telemetry
from proxy.live_session import LiveSession

CHANNELS = tuple(Channel(value) for value in range(len(Channel)))


def count(meter: Meter, event: Chunk) -> None:
    """Meter a chunk's text."""
    for delta in event.deltas:
        meter.add(delta.choice, CHANNELS[delta.channel], delta.text, delta.tool)


def report(session: LiveSession, usage: ReportedUsage) -> None:
    """Meter a provider's usage; a report that cannot be believed is noted and left."""
    meter, provider = session.meter, session.attempts[-1].provider
    refused: str | None = "no prompt or completion count"
    most = session.output_most
    if most is not None and usage.output is not None and usage.output > most:
        refused = f"more than {most} output tokens, which the request's limit rules out"
    elif meter is not None and usage.prompt is not None and usage.output is not None:
        charged = TokenUsage(
            prompt=usage.prompt,
            cached=usage.cached,
            cache_write=usage.cache_write,
            output=usage.output,
            reasoning=usage.reasoning,
            audio_input=usage.audio_input,
            audio_output=usage.audio_output,
            cache_write_1h=usage.cache_write_1h,
            image_output=usage.image_output,
        )
        if session.carried is not None:  # of who goes on with another's stream, only the output counts
            charged = TokenUsage(0, 0, 0, usage.output, usage.reasoning)
        refused = meter.report(charged, partial=usage.partial)
    if refused is None:
        session.reported_raw = session.reported_raw if usage.partial else usage.raw
    else:
        telemetry.USAGE_REFUSED.labels(provider).inc()
        telemetry.log.warning(
            "usage refused",
            request_id=session.request_id,
            session=session.id,
            provider=provider,
            reason=refused,
        )

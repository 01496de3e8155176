"""Server-sent events, bytes in, frames out. Lines end at CR LF, LF or CR and nowhere else.

Must not: decode text, know JSON, or keep more than one unfinished frame. Source of the grammar: WHATWG HTML, 9.2.6.
"""

from __future__ import annotations

_CR = 0x0D  # as a number: looking for b"\r" in bytes costs several times as much
_LF = 0x0A


class FrameTooLarge(Exception):
    """The upstream sent a frame above the bound."""


class SseSplitter:
    """Feed bytes as they arrive; get `(event, data)` of each frame that a blank line has ended.

    Comments and `id:`/`retry:` lines are dropped, frames without data too. `event` is b"" when absent.
    """

    __slots__ = ("_frame_bytes_max", "_skip_lf", "_started", "_tail")

    def __init__(self, frame_bytes_max: int) -> None:
        self._tail = b""
        self._skip_lf = False
        self._started = False
        self._frame_bytes_max = frame_bytes_max

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """Frames completed by `data`. Raises FrameTooLarge; the splitter is unusable afterwards."""
        if not data:
            return []
        if self._skip_lf or _CR in data:
            data = self._normalise(data)
        if (
            data.find(b"\n") == len(data) - 2 <= self._frame_bytes_max
            and data[-1] == _LF
            and data.startswith(b"data: ")
            and self._started
            and not self._tail
        ):
            return [(b"", data[6:-2])]  # one frame of one line, as nearly every read of a stream brings
        if not self._started:
            data = self._skip_bom(data)
        blocks = (self._tail + data if self._tail else data).split(b"\n\n")
        self._tail = blocks.pop()
        if len(self._tail) > self._frame_bytes_max:
            raise FrameTooLarge
        frames = []
        for block in blocks:
            if block.startswith(b"data: ") and b"\n" not in block:
                payload = block[6:]
                if len(payload) > self._frame_bytes_max:
                    raise FrameTooLarge
                frames.append((b"", payload))
            elif block:
                frame = self._parse(block)
                if frame is not None:
                    frames.append(frame)
        return frames

    def end(self) -> list[tuple[bytes, bytes]]:
        """The frame left without its blank line when the body ended: providers do end so after `[DONE]`."""
        tail, self._tail = self._tail.strip(b"\n"), b""
        frame = self._parse(tail) if tail else None
        return [] if frame is None else [frame]

    def _skip_bom(self, data: bytes) -> bytes:
        whole = self._tail + data
        if len(whole) < 3 and b"\xef\xbb\xbf".startswith(whole):
            return data
        self._started = True
        self._tail = b""
        return whole.removeprefix(b"\xef\xbb\xbf")

    def _normalise(self, data: bytes) -> bytes:
        """CR LF and CR become LF. A CR at the end counts at once; the LF that may follow it is then skipped."""
        if self._skip_lf and data.startswith(b"\n"):
            data = data[1:]
        self._skip_lf = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _parse(self, block: bytes) -> tuple[bytes, bytes] | None:
        event = b""
        data: list[bytes] = []
        for line in block.split(b"\n"):
            name, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if name == b"data":
                data.append(value)
            elif name == b"event":
                event = value
        if not data:
            return None
        payload = data[0] if len(data) == 1 else b"\n".join(data)
        if len(payload) > self._frame_bytes_max:
            raise FrameTooLarge
        return event, payload

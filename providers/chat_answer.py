"""A whole answer's message, gathered from a provider's blocks in the order in which they come.

Must not: know a provider's blocks: the codec says what is in each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from providers.chat_chunks import assistant_message
from providers.chat_citations import Citations
from providers.claude import THINKING_BLOCKS


class Parts:
    """What the blocks so far have said. `calls` as `chat_chunks.tool_call` makes them; `thinking` are blocks with
    signatures, or redacted ones, that must come back."""

    def __init__(self, url_of: Callable[[Mapping[str, Any]], str | None]) -> None:
        """`url_of` as in `Citations`."""
        self.reasoning = ""
        self.calls: list[dict[str, Any]] = []
        self.thinking: list[dict[str, Any]] = []
        self._text = ""
        self._cited: dict[str, list[Any]] = {"annotations": [], "citations": []}
        self._citations = Citations(url_of)

    def add_text(self, text: str, citations: Any = None) -> None:
        """A piece of the answer, and the list of what it is taken from, where there is one."""
        start = len(self._text)
        self._text += text
        if isinstance(citations, list):
            for name, members in self._citations.members(citations, start, len(self._text)).items():
                self._cited[name] += members

    def add_thinking(self, thinking: str, signature: str | None) -> None:
        """A thought, which need not come back where it has no signature."""
        self.reasoning += thinking
        if signature:
            self.thinking.append({"type": "thinking", "thinking": thinking, "signature": signature})

    def message(self, refusal: str = "") -> dict[str, Any]:
        """OpenAI's message. Content is null only beside tool calls."""
        extra = {name: members for name, members in {**self._cited, THINKING_BLOCKS: self.thinking}.items() if members}
        content = self._text if self._text or not self.calls else None
        return assistant_message(
            content, reasoning=self.reasoning, refusal=refusal or None, tool_calls=self.calls, extra=extra
        )

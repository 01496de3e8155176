"""Production's event loop for tests in which warnings are errors.

uvloop warns of each transport that is still open when the loop closes, from a callback that cannot raise. Where such a
warning is an error the transport is left open, and `close()` waits for it for ever: a leak would hang instead of fail.
"""

from __future__ import annotations

import warnings

import uvloop


class ClosingLoop(uvloop.Loop):
    """uvloop's loop, which closes all that is left and warns afterwards."""

    def close(self) -> None:
        """Close the loop. Raises the first warning where warnings are errors."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            super().close()
        for each in caught:
            warnings.warn(each.message, stacklevel=2)

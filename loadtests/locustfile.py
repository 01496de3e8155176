"""The Locust file: `locust -f loadtests/locustfile.py -H http://127.0.0.1:8080`, LOADTEST_KEYS naming a file of keys.

`make loadtest` runs it against a fresh gateway (docs/load-testing.md). Must not: hold any logic.
"""

from __future__ import annotations

from loadtests.users.people import Leaving, SlowReader, Streaming, Unlucky, Whole

__all__ = ["Leaving", "SlowReader", "Streaming", "Unlucky", "Whole"]

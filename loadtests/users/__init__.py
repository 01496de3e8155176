"""Users of an OpenAI-compatible server, for Locust: their wire, their calls, and how they behave.

Must not: import the gateway or anything outside the standard library and Locust; they run in a virtual environment of
their own, against any address.
"""

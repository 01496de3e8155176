"""The simulated provider: a real HTTP/1.1 server, in its own process on loopback, that speaks OpenAI's chat wire.

It is the demo's model, the tests' upstream and the load tests' target. Must not: import the gateway or the proxy, write
anything but one JSON line to stdout, or listen beyond loopback unless told to.
"""

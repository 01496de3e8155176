"""Chaos: several gateways, a replicated Valkey, Postgres and two simulated providers, and faults in between.

Must not: import the gateway. It is started, asked and audited as an operator would.
"""

"""A deterministic simulation of the session core: the real relays, pump, settler, registry and transport on a loop of
its own, with a virtual clock, a model of the ledger's server, scripted providers and scripted clients. No sockets.

One integer, the seed, decides everything of a schedule: `schedule.run(seed)`.
"""

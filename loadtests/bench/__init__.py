"""`make bench`: CPU per request and per chunk, time to first token, memory and start of a real running Tollgate.

Must not: import the gateway. It is measured as users run it, from outside, through its processes.
"""

# Proofs that take longer than `make test` may. Included by the Makefile, which owns `.venv`.

# ---- make simulate: the session core on a loop without sockets, one seed per schedule (tests/support/simulation/) ----
.PHONY: simulate
simulate: .venv/.installed ## seeded schedules of the session core (SIMULATE_SCHEDULES=100000 SEED=n, REPLAY=n for one)
	@SIMULATE_SCHEDULES=$(SIMULATE_SCHEDULES) SEED=$(SEED) SIMULATE_PROCESSES=$(SIMULATE_PROCESSES) \
	  .venv/bin/python -m tests.support.simulation $(if $(REPLAY),--seed $(REPLAY))

# ---- make prove-lua: microseconds of the server for each of the ledger's busy scripts ----
.PHONY: prove-lua
prove-lua: .venv/.installed ## what the ledger's scripts cost the server, in microseconds
	@.venv/bin/python -m tests.support.lua_cost

# ---- make prove-model: random histories of the ledger's scripts against a small model (tests/support/lua_model*.py) ----
.PHONY: prove-model
prove-model: .venv/.installed ## random histories of the ledger's scripts (MODEL_EXAMPLES=2000 SEED=n; ARGS="--mutant all")
	@MODEL_EXAMPLES=$(MODEL_EXAMPLES) SEED=$(SEED) .venv/bin/python -m tests.support.lua_model_runs $(ARGS)

# ---- make prove-drain: how fast a full outbox goes to Postgres, and what the time is spent on (docs/journal.md) ----
.PHONY: prove-drain
prove-drain: .venv/.installed ## entries/s from a full outbox to Postgres (DRAIN_ENTRIES=200000; ARGS="--sample --batch 4000")
	@.venv/bin/python -m tests.support.drain_cost --entries $(or $(DRAIN_ENTRIES),200000) $(ARGS)

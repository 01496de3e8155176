# Load on a fresh gateway, and whether every token of it was charged right (docs/load-testing.md). Included by the Makefile.
# The virtual environment .venv-bench is made in make/bench.mk.

.PHONY: loadtest soak
loadtest: $(VENV)/.run-stamp .venv-bench/.installed ## load on a fresh gateway, checked to the token (LOADTEST_USERS=50 LOADTEST_SECONDS=60)
	@LOADTEST_USERS=$(LOADTEST_USERS) LOADTEST_SECONDS=$(LOADTEST_SECONDS) LOADTEST_WORKERS=$(LOADTEST_WORKERS) \
	  $(BIN)/python -P -m loadtests.run_loadtest

soak: $(VENV)/.run-stamp .venv-bench/.installed ## mixed load for SOAK_MINUTES=30: memory, keys and ledger must hold still
	@SOAK_MINUTES=$(SOAK_MINUTES) SOAK_USERS=$(SOAK_USERS) SOAK_WORKERS=$(SOAK_WORKERS) \
	  $(BIN)/python -P -m loadtests.soak

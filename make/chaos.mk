# Faults under load, and whether every micro is still there (docs/reliability.md). Included by the Makefile.
# Ends everything that it started. As root, Valkey's data lie on a small tmpfs, so that its disk can be filled.

.PHONY: chaos
chaos: $(VENV)/.installed ## faults under load for CHAOS_MINUTES=10, checked to the micro (CHAOS_SEED=... CHAOS_FAULTS="...")
	@CHAOS_MINUTES="$(CHAOS_MINUTES)" CHAOS_SEED="$(CHAOS_SEED)" CHAOS_FAULTS="$(CHAOS_FAULTS)" \
	  CHAOS_JSON="$(CHAOS_JSON)" CHAOS_GATEWAYS="$(CHAOS_GATEWAYS)" CHAOS_CLIENTS="$(CHAOS_CLIENTS)" \
	  CHAOS_SECONDS="$(CHAOS_SECONDS)" $(BIN)/python -P -m loadtests.chaos $(ARGS)

# What Tollgate costs, measured. Included by the Makefile, which owns `.venv` and `PYTHON`.

# ---- make bench: a real gateway with stores of its own, beside nginx where it is installed ----
.PHONY: bench bench-plot bench-check
bench: .venv/.installed ## CPU per request and per chunk, latency and memory, beside nginx (ARGS="chunks500 --json FILE")
	@.venv/bin/python -m loadtests.bench $(ARGS)

bench-check: .venv/.installed ## the budgets that need nginx, valgrind or strace (loadtests/budgets.toml)
	@.venv/bin/python -m loadtests.bench.check $(ARGS)

# ---- the picture, in an environment of its own: matplotlib is nothing that tests need ----
bench-plot: .venv/.installed .venv-bench/.installed ## cost per chunk against number of streams, as build/bench.svg and .png
	@.venv/bin/python -m loadtests.bench curve --json build/bench-curve.json $(ARGS)
	@.venv-bench/bin/python -m loadtests.bench.plot build/bench-curve.json build/bench.svg build/bench.png

.venv-bench/.installed: requirements-bench.lock
	@echo "Installing into .venv-bench ..."
	@$(PYTHON) -m venv .venv-bench
	@.venv-bench/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements-bench.lock
	@touch $@

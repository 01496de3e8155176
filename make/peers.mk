# LiteLLM and Portkey beside Tollgate, each in a place of its own: .venv-peers and build/peers. Included by the Makefile.
# What cannot be installed (no npm, no network) is named and left out; loadtests/bench/peer_processes.py installs.

.PHONY: bench-peers lock-portkey
bench-peers: .venv/.installed ## CPU of LiteLLM and Portkey over Tollgate's (ARGS="portkey --json FILE")
	@.venv/bin/python -m loadtests.bench.peers $(ARGS)

# `make lock` writes requirements-peers.lock. npm leaves addresses out of its own lock file when told so.
lock-portkey: ## write loadtests/bench/portkey/package-lock.json anew
	npm install --prefix loadtests/bench/portkey --package-lock-only --omit-lockfile-registry-resolved \
	  --ignore-scripts --no-fund --no-audit

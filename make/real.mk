# The real inference server of `make test-real`, and the lock files. Included by the Makefile, which owns `.venv` and `PYTHON`.
# Recipes use no index address: the ordinary settings of pip and uv decide where packages come from.

PYTHON ?= python3

# ---- make test-real: llama-cpp-python's server, compiled here once into .venv-real (5 to 15 minutes; pip keeps the wheel) ----
REAL_PYTHON := .venv-real/bin/python
# Leaves out what a text model on a CPU does not need.
REAL_CMAKE_ARGS := -DLLAVA_BUILD=OFF -DGGML_OPENMP=OFF -DLLAMA_CURL=OFF -DGGML_LLAMAFILE=OFF

.PHONY: test-real
test-real: .venv/.installed .venv-real/.installed ## acceptance tests against a real inference server (needs a C++ compiler)
	.venv/bin/python -m tests.real $(ARGS)

.venv-real/.installed: requirements-real-build.lock requirements-real.lock
	@compiler=$$(if [ -n "$$CXX" ]; then command -v "$${CXX%% *}"; else command -v c++ || command -v g++ || command -v clang++; fi) || { \
	  echo "make test-real: no C++ compiler found (looked for \$$CXX, c++, g++, clang++)." >&2; \
	  echo "It compiles llama-cpp-python. Install one, for example: apt-get install g++, dnf install gcc-c++," >&2; \
	  echo "or on macOS xcode-select --install. Nothing else in this repository needs a compiler." >&2; exit 2; }; \
	echo "compiling llama-cpp-python with $$compiler: 5 to 15 minutes, once"
	$(PYTHON) -m venv .venv-real
	$(REAL_PYTHON) -m pip install --quiet --require-hashes -r requirements-real-build.lock
	PATH="$(CURDIR)/.venv-real/bin:$$PATH" CMAKE_ARGS="$(REAL_CMAKE_ARGS)" \
	  $(REAL_PYTHON) -m pip install --require-hashes --no-build-isolation -r requirements-real.lock
	@touch $@

# ---- make lock: every lock file anew, for Python 3.11+ on Linux and macOS at once; LOCK_ARGS=--upgrade takes newer versions ----
UV := .venv-lock/bin/uv
LOCK := $(UV) pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-emit-index-url \
	--custom-compile-command "make lock" $(LOCK_ARGS)

.PHONY: lock
lock: ## write the lock files anew (LOCK_ARGS=--upgrade for newer versions)
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet uv==0.13.8
	$(LOCK) --output-file requirements.lock pyproject.toml requirements.in
	$(LOCK) --constraints requirements.lock --output-file requirements-dev.lock \
	  pyproject.toml requirements.in requirements-dev.in
	$(LOCK) --output-file requirements-real-build.lock requirements-real-build.in
	$(LOCK) --output-file requirements-real.lock requirements-real.in
	$(LOCK) --output-file requirements-bench.lock requirements-bench.in
	$(LOCK) --output-file requirements-peers.lock requirements-peers.in

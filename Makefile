# Everything runs in .venv, which the first target makes and later ones reuse.
#   make demo ARGS="--model tiny --steps 5"      make test ARGS="tests/docs -x"
PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/.installed-demo
DEV := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help install demo notebook test bench conformance compare ray fuzz attacks faults soak storm guards audit fresh lint types docs clean
.SUFFIXES:

help:
	@echo "make demo   fine-tune SmolLM2 with a composed loss (under 10 minutes on 2 cores)"
	@echo "make notebook   run examples/notebook.ipynb and save it with its outputs"
	@echo "make test   all tests, with branch coverage"
	@echo "make faults   what production does to requests, and a table of what was injected and checked"
	@echo "make bench  side by side with the official SDK and plain torch, against targets (about 10 minutes)"
	@echo "make conformance   other SDKs and servers, into docs/compatibility.md (large installs)"
	@echo "make compare   losses against the functions of TRL and verl, in environments of their own (large installs)"
	@echo "make ray    terms on a local Ray of two nodes, of which one is killed (installs Ray into .ray)"
	@echo "make fuzz   any bytes for everything that reads bytes, SECONDS=60"
	@echo "make attacks  CPU time of everything that reads bytes of others, as their number grows"
	@echo "make soak   a long run among faults, against a twin without: SECONDS=600, SEED= repeats one"
	@echo "make storm  1,000 terms in worker processes, some killed, some too slow, some cancelled (about 4 minutes)"
	@echo "make guards replaces lines that keep promises, and shows that their tests then fail (about 10 minutes)"
	@echo "make audit  known vulnerabilities of what is installed (needs the network)"
	@echo "make fresh  demo and test on bare Debians, as root with debootstrap: ARGS=bookworm or ARGS=trixie for one"
	@echo "make lint   ruff and the import contracts"
	@echo "make types  pyright"
	@echo "make docs   the documentation, into site/"
	@echo "make clean  remove .venv, caches and built files (runs/ stays)"

install: $(DEV)

# The demo's packages are a part of the developers': `make test` installs the rest into the same environment.
$(DEMO): pyproject.toml constraints-demo.txt
	@$(PYTHON) scripts/install.py demo

$(DEV): pyproject.toml constraints-demo.txt constraints.txt
	@$(PYTHON) scripts/install.py dev

demo: $(DEMO)
	@$(BIN)/tinkex-py demo $(ARGS)

notebook: $(DEV)
	@$(BIN)/python -m tests.examples.notebook

# The whole suite runs in two processes. With ARGS only a part runs, so the coverage of the whole is not asked for.
test: $(DEV)
ifeq ($(strip $(ARGS)),)
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal --cov --cov-report=term:skip-covered
else
	@$(BIN)/python -m pytest -q $(ARGS)
endif

# Ends with a table of the faults that were injected, and of the promises that were checked.
faults: $(DEV)
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal tests/faults $(ARGS)

# ARGS names benchmarks, such as "a c --rounds 3"; without it all are run. Fails when a target is missed.
bench: $(DEV)
	@$(BIN)/python -m benchmarks $(ARGS)

# ARGS names pairs, such as skyrl-0.4.0, or their beginnings, such as cookbook; without it all are run.
conformance: $(DEV)
	@$(BIN)/python -m tests.peers $(ARGS)

# Needs the network the first time. Writes tests/objectives/compare/numbers.json.
compare: $(DEV)
	@$(BIN)/python -m tests.objectives.compare

# Ray is installed beside the packages of .venv, not among them, so that it does not move their versions.
ray: .ray/bin/ray
	@.ray/bin/python -m pytest -q tests/integrations/test_ray.py $(ARGS)

.ray/bin/ray: $(DEV)
	@$(BIN)/python -m venv .ray
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' > .ray/venv.pth
	@mv .ray/venv.pth .ray/lib/python3*/site-packages/
	@.ray/bin/python -m pip --disable-pip-version-check install --quiet -e '.[ray]'
	@touch $@

# An input that breaks something is kept in the current folder, as crash-...
fuzz: $(DEV)
	@$(BIN)/python -m tests.fuzz --seconds $(or $(SECONDS),60) $(ARGS)

# Fails if a reader takes more than 8 times as long for 4 times as much. ARGS: a word, for rows whose name has it.
attacks: $(DEV)
	@$(BIN)/python -m tests.attacks $(ARGS)

# Fails with the seed and the first difference; SEED=... repeats a run.
soak: $(DEV)
	@$(BIN)/python -m tests.soak --seconds $(or $(SECONDS),600) $(if $(SEED),--seed $(SEED)) $(ARGS)

# TERMS: how many.
storm: $(DEV)
	@TINKEX_TEST_PROCESS_TERMS=$(or $(TERMS),1000) $(BIN)/python -m pytest -q -s tests/processes/test_storm.py $(ARGS)

# Works on a copy. ARGS: -k WORD for some of them.
guards: $(DEV)
	@$(BIN)/python -m tests.guards $(ARGS)

# In an environment of its own, so that it does not audit what it brings itself.
audit: $(DEV)
	@test -x .audit/bin/pip-audit || { $(PYTHON) -m venv .audit && .audit/bin/python -m pip --disable-pip-version-check install --quiet pip-audit; }
	@$(BIN)/python -m tests.security.audit .audit/bin/pip-audit $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

# Needs no .venv: it makes a system, clones the last commit into it and installs there. ARGS: a suite, then commands.
fresh:
	@sh scripts/fresh.sh $(ARGS)

lint: $(DEV)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { $(BIN)/ruff format --check .; exit 1; }
	@report=$$($(BIN)/lint-imports --no-logo 2>&1) || { echo "$$report"; exit 1; }
	@echo "lint: clean"

types: $(DEV)
	@$(BIN)/pyright

docs: $(DEV)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict && echo "site/index.html is ready"

clean:
	@rm -rf $(VENV) .audit .ray site dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage .coverage.*
	@find . -name __pycache__ -prune -exec rm -rf {} +

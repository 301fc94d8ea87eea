# Every target sets up what it needs. PYTHON chooses the interpreter; by default the first one found that is 3.11 or 3.12.
SUITABLE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p -c '$(SUITABLE)' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
TOOLS := $(VENV)/tools
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: quickstart test test-faults test-tools chart chart-files lint format setup setup-dev clean help

help: ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

quickstart: $(VENV)/.local ## install, then raw logs to served slates on MovieLens-100K
	@$(BIN)/rankgr quickstart

# Two processes that share two cores: threads of their own would only wait for each other.
PYTEST := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

test: $(VENV)/.dev test-tools ## install, then the tests
	@$(PYTEST) --dist loadgroup --ignore tests/fault --ignore tests/chart

test-faults: $(VENV)/.dev ## install, then the tests that interrupt and kill what runs
	@$(PYTEST) --dist loadfile tests/fault

chart: $(VENV)/.dev ## install, then the tests of the Helm chart, with a real Helm
	@$(BIN)/python -m tests.chart.tools
	@$(PYTEST) --dist loadfile tests/chart

chart-files: $(VENV)/.dev ## make what follows from the chart's values.yaml: schema, README, copies
	@$(BIN)/python -m tests.chart.generate

# What pip does not bring. Without it the tests that need it are skipped and say so; with CI=true they fail.
BROWSER := chromium-headless-shell fonts-dejavu-core
APT := DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300

test-tools: $(VENV)/.dev ## a browser and promtool for the tests of page and alert rules
	@mkdir -p $(TOOLS)
	@(command -v chromium-headless-shell || command -v chromium || command -v google-chrome) > /dev/null || \
		(test "$$(id -u)" = 0 && $(APT) update && $(APT) install -y --no-install-recommends $(BROWSER)) > $(TOOLS)/browser.log 2>&1 || \
		echo "no browser, so that the page is not tested; as root: apt-get install $(BROWSER)"
	@command -v promtool > /dev/null || test -x $(TOOLS)/usr/bin/promtool || \
		(cd $(TOOLS) && (apt-get -qq download prometheus || (test "$$(id -u)" = 0 && $(APT) update && apt-get -qq download prometheus)) && \
		dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x ./usr/bin/promtool; \
		rm -f prometheus_*.deb; test -x usr/bin/promtool) > $(TOOLS)/promtool.log 2>&1 || \
		echo "no promtool, so that the alert rules are not tested; install Debian's package prometheus, or Prometheus' own archive"

lint: $(VENV)/.dev ## style, types, import arrow
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(VENV)/.dev ## rewrite to the project's style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

setup: $(VENV)/.local ## install what running needs

setup-dev: $(VENV)/.dev ## install what developing needs

# torch comes first: with it in place, nothing else draws in another build of it.
$(VENV)/.torch: constraints.txt
	@test -n "$(PYTHON)" || (echo "Python 3.11 or 3.12 is needed: apt-get install python3 python3-venv, or make PYTHON=/path/to/python" && exit 1)
	@echo "installing (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV) || (echo "python venv is missing: apt-get install python3-venv" && exit 1)
	@$(PIP) install -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/.local: $(VENV)/.torch pyproject.toml
	@$(PIP) install -c constraints.txt -e '.[local]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.local

clean: ## remove the environment and all that runs wrote here
	@rm -rf $(VENV) .rankgr .cache .mypy_cache .ruff_cache .pytest_cache

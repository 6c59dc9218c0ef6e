# make reproduce [PROFILE=smoke]   every figure, table and verdict, from nothing
# make test [JOBS=2]               environment, export drift, clean notebooks, pytest
# make lab                         the notebooks in JupyterLab
# make export                      nbs/ -> musicssl/
# make bench                       speed beside what else one could use (QUICK=1: within minutes)
# make gpu-check                   what only a GPU can show
PYTHON  ?= python3
VENV    ?= .venv
PROFILE ?= smoke
FRESH   ?=
QUICK   ?=
JOBS    ?= 2
BIN     := $(VENV)/bin
READY   := $(VENV)/.musicssl-installed

.PHONY: reproduce test check export lab bench gpu-check clean

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else "musicssl needs Python 3.10 to 3.13, got %d.%d: make PYTHON=python3.11 ..." % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true # pip uses one core for it; templates that are not Python yet do not matter
	touch $@

reproduce: $(READY)
	$(BIN)/musicssl reproduce --profile $(PROFILE) $(if $(FRESH),--fresh)

test: check
	$(BIN)/python -m compileall -q musicssl # once, rather than in every process where PYTHONDONTWRITEBYTECODE is set
	$(BIN)/python -m pytest -n $(JOBS) --max-worker-restart 0

check: $(READY)
	$(BIN)/python tests/check_sources.py

export: $(READY)
	$(BIN)/jupyter nbconvert --log-level=WARN --clear-output --inplace $$(find nbs -name '*.ipynb' -not -path '*/.ipynb_checkpoints/*')
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-export

lab: $(READY)
	$(BIN)/jupyter lab nbs

bench: $(READY)
	for room in data features augment train probe; do $(BIN)/python benchmarks/$$room.py $(if $(QUICK),--quick) || exit 1; done

gpu-check: $(READY)
	$(BIN)/python -m pytest -m gpu tests
	$(BIN)/python benchmarks/data.py --only P17 R14 --device cuda
	$(BIN)/python benchmarks/features.py --only P6 --device cuda
	$(BIN)/python benchmarks/augment.py --only P3 --device cuda
	$(BIN)/python benchmarks/train.py --only P9 P11 P12 MT --device cuda

clean:
	rm -rf figures/smoke figures/test .cache build dist *.egg-info

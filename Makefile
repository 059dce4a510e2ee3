# `make demo` and `make test` on a fresh machine with Python 3.11+ and make: each sets up .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEVELOPING := $(VENV)/.developing
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
# uv takes a tenth of pip's time. If it fails, pip installs. uv prefers an extra index to the default one, even if it has
# only the wheel without compiled libraries, so extra indexes serve torch alone, whose CPU build may be there
pip_option = $(shell $(PYTHON) -m pip config list 2>/dev/null | sed -n "s/^.*\.$(1)='\(.*\)'$$/\1/p" | sed 's/\\n/ /g' | tail -n 1)
UV = $(BIN)/uv pip install --python $(BIN)/python \
	$(addprefix --constraint ,constraints.txt $(call pip_option,constraint)) \
	$(addprefix --default-index ,$(call pip_option,index-url)) $(addprefix --find-links ,$(call pip_option,find-links))
UV_TORCH = $(UV) --index-strategy unsafe-best-match $(addprefix --index ,$(call pip_option,extra-index-url)) torch
# where the tests look for the npm package @huggingface/transformers
export NODE_PACKAGES ?= $(abspath $(VENV))/node/node_modules
TRANSFORMERS_JS := $(NODE_PACKAGES)/@huggingface/transformers/package.json
NODE := $(and $(shell command -v node),$(wildcard $(TRANSFORMERS_JS)))
export CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

.DEFAULT_GOAL := help
.PHONY: help demo demo-seeds test test-slow test-gpu test-browser test-node cards lint format hooks wheel clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		(echo "error: Python 3.11 or newer is needed; choose it with: make PYTHON=python3.12 ..." && exit 1)
	$(PYTHON) -m venv $(VENV)
	$(PIP) uv
	# torch first and pinned: without it the other packages would take a build several times as large
	$(UV_TORCH) || $(PIP) torch
	$(UV) --editable . || $(PIP) --editable .
	@touch $@

$(DEVELOPING): $(INSTALLED)
	$(UV) --editable '.[dev]' || $(PIP) --editable '.[dev]'
	@touch $@

DISTILL := $(BIN)/python examples/distill.py --config examples/demo/demo.yaml
# the demo's two students in the directory $(1), with the options $(2), and their comparison. The demo's teacher is wrong
# about a third of the words: its weight is multiplied by its probability of the label. The first student has both phases
# of the method
define COMPARED
	$(DISTILL) --weight_teacher_by_label_prob True --self_weight 0.3 --teacher_cache_dir $(1)/cache/labels --output_dir $(1)/askd $(2)
	$(DISTILL) --preset ce --compare False --output_dir $(1)/labels_only $(2)
	$(BIN)/python examples/demo/compare.py --askd $(1)/askd --labels_only $(1)/labels_only --picture $(1)/demo.png

endef
demo: $(INSTALLED)  ## distill the small shipped teacher for telephone calls, and compare (3 minutes on 2 CPU cores)
	rm -rf runs/demo
	$(call COMPARED,runs/demo)

SEEDS := 1 2 3
demo-seeds: $(INSTALLED)  ## the demo with SEEDS="1 2 3": errors, differences and speed of each (1 to 2 minutes per seed)
	rm -rf runs/demo-seeds
	$(foreach seed,$(SEEDS),$(call COMPARED,runs/demo-seeds/$(seed),--seed $(seed) --encoder_cache_dir runs/demo-seeds/encoder))
	$(BIN)/python examples/demo/seeds.py runs/demo-seeds

test: $(DEVELOPING)  ## the tests, without the slow ones
	@test -n "$(CHROMIUM)" || echo "Chromium isn't installed: without the tests in a browser, see make test-browser"
	@test -n "$(NODE)" || echo "Node.js or transformers.js isn't installed: without their tests, see make test-node"
	$(BIN)/python -m pytest -m 'not slow and not gpu$(if $(CHROMIUM),, and not browser)$(if $(NODE),, and not node)' -n auto --maxprocesses 4 --dist worksteal --durations=15

test-slow: $(DEVELOPING)  ## the slow tests: the whole demo, the wheel, compiled models, fresh interpreters
	$(BIN)/python -m pytest -m 'slow$(if $(NODE),, and not node)' -n auto --maxprocesses 4 --dist worksteal

comma := ,
# a trainer in one process takes one card, the first; the test of two processes starts them with all of these
CARDS := $(or $(CUDA_VISIBLE_DEVICES),0$(comma)1)
test-gpu: export TEST_CARDS := $(CARDS)
test-gpu: export CUDA_VISIBLE_DEVICES := $(firstword $(subst $(comma), ,$(CARDS)))
test-gpu: $(DEVELOPING)  ## the tests that need a CUDA card; those of two processes are skipped without a second one
	$(BIN)/python -m pytest -m gpu

test-browser: $(DEVELOPING)  ## the tests of the HTML report in Chromium (Debian's package chromium, or CHROMIUM=path)
	@test -n "$(CHROMIUM)" || \
		(echo "error: Chromium is needed: apt-get install chromium, or make test-browser CHROMIUM=path" && exit 1)
	$(BIN)/python -m pytest -m 'browser and not node'

# the scripts of the package download a CUDA library
$(TRANSFORMERS_JS):
	@command -v npm >/dev/null || (echo "error: Node.js 20 or newer with npm is needed: nodejs.org" && exit 1)
	npm install --silent --no-save --ignore-scripts --prefix $(dir $(NODE_PACKAGES)) @huggingface/transformers@4.3.2

test-node: $(DEVELOPING) $(TRANSFORMERS_JS)  ## exported models in transformers.js: Node.js, and Chromium if installed
	$(BIN)/python -m pytest -m 'node$(if $(CHROMIUM),, and not browser)'

cards: $(DEVELOPING)  ## render the golden model cards of model_cards/ again
	$(BIN)/python tests/support/make_cards.py

lint: $(DEVELOPING)  ## ruff: rules and format; import-linter: the order of the packages; mypy: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(DEVELOPING)  ## ruff: fix what it can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: $(DEVELOPING)  ## run ruff before every commit
	$(BIN)/pre-commit install

# without isolation, so that the build backend is the one of constraints.txt
wheel: $(DEVELOPING)  ## build the source distribution and the wheel into dist/
	rm -rf build dist
	$(BIN)/python -m build --no-isolation

clean:  ## remove .venv, what was built, and the demo's runs
	rm -rf $(VENV) build dist runs/demo runs/demo-seeds

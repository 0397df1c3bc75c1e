# pyvmm: everything a person does with the source tree. `make setup` makes the virtual environment the rest uses;
# `make help` lists the targets: the lines that begin with two number signs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BUILD := build/dev

.PHONY: help setup boot test native mutations slow svm svm-smoke svm-shell vmx lint tidy docs coverage coverage-native \
        coverage-python wheel try-wheel bench fuzz fuzz-native clean

## help: list the targets
help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST) | while IFS=: read -r target text; do printf '  %-14s%s\n' "$$target" "$$text"; done

## setup: make .venv with pyvmm, editable, and the tools of test and lint
setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml setup.py CMakeLists.txt $(wildcard native/include/*.h native/include/*/*.h) vmm/_ffi/build.py $(wildcard native/*/*.[ch])
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# Tools that only some targets need are dependency groups of pyproject.toml: $(VENV)/.docs has the group `docs`.
$(VENV)/.%: pyproject.toml | $(VENV)/.done
	$(BIN)/python -m pip install --quiet --group $*
	touch $@

## boot: a shell inside a Linux guest (Ctrl-A x quits)
boot: setup
	$(BIN)/pyvmm boot

# The C half under AddressSanitizer and UBSan, then everything else. Where KVM emulates guest kernel code, a boot of
# Linux takes 15 s and more: most tests that need one of their own are run by `make svm TESTS=tests/linux`.
## test: the C tests under sanitizers, then every test but the slow ones (PYTEST_ARGS="-k uart")
test: setup native
	$(BIN)/python -m pytest -m "$$($(BIN)/python tests/ordinary.py)" -n 2 --dist loadgroup --durations=25 $(PYTEST_ARGS)

## native: build and run the C tests
native:
	cmake -S . -B $(BUILD) -DVMM_GUESTS=ON >/dev/null
	cmake --build $(BUILD) -j2
	cd $(BUILD) && ctest --output-on-failure

## mutations: break the concurrency logic in one place at a time; a test must notice each
mutations:
	$(PYTHON) native/tests/mutations.py

# A stock distribution kernel: 10-20 minutes where KVM emulates guest kernel code.
## slow: the tests that boot a distribution's kernel
slow: setup
	$(BIN)/python -m pytest -m slow --timeout 3600 $(PYTEST_ARGS)

# An ordinary KVM host (SVM) in QEMU's TCG, built from Debian packages: needs no /dev/kvm. TESTS are words for pytest,
# as in make svm TESTS="tests/kvm -k uart"; the results are in build/svm/junit.xml, too.
TESTS ?= tests -m "not slow"
## svm: tests on an SVM host in QEMU's TCG (TESTS="tests/kvm -k uart")
svm: setup
	$(BIN)/python -m tests.svm run $(TESTS)

## svm-smoke: doctor, hello and one command in Linux there
svm-smoke: setup
	$(BIN)/python -m tests.svm smoke

## svm-shell: a shell there
svm-shell: setup
	$(BIN)/python -m tests.svm shell

# A host with VT-x in Bochs, one slow processor: a smoke test. The results are in build/vmx/junit.xml.
## vmx: a smoke test on a VT-x host in Bochs
vmx: setup
	$(BIN)/python -m tests.vmx run

# Several conftest.py would have one module name, and tests.svm is imported by its full name: these are named as modules.
TYPED = $(subst /,.,$(patsubst %.py,-m %,$(filter-out %/__init__.py,$(wildcard tests/svm/*.py tests/vmx/*.py \
        tests/conftest.py tests/*/conftest.py tests/unit/*/conftest.py))))

## lint: ruff, mypy --strict over package and tests, clang-format
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy $(TYPED)
	clang-format --dry-run -Werror $(shell find native -name '*.[ch]')

## tidy: clang-tidy over the native half (.clang-tidy lists the checks)
tidy: $(VENV)/.tidy
	cmake -S . -B build/tidy -DCMAKE_EXPORT_COMPILE_COMMANDS=ON -DVMM_TESTS=OFF -DVMM_GUESTS=OFF >/dev/null
	$(BIN)/run-clang-tidy.py -p build/tidy -quiet -clang-tidy-binary $(BIN)/clang-tidy -j $$(nproc)

## docs: the API reference, from the docstrings, in build/docs/index.html
docs: $(VENV)/.docs
	$(BIN)/python docs/reference.py build/docs

# COVERED are words for pytest, as in make coverage COVERED="tests/unit".
COVERED ?= tests
## coverage: which lines the tests run, in build/coverage/report (COVERED="tests/unit")
coverage: coverage-native coverage-python

coverage-native: $(VENV)/.coverage
	cmake -S . -B build/coverage/native -DVMM_COVERAGE=ON -DVMM_GUESTS=OFF -DCMAKE_BUILD_TYPE=Debug >/dev/null
	cmake --build build/coverage/native -j2
	find build/coverage/native -name '*.gcda' -delete
	cd build/coverage/native && ctest --output-on-failure
	mkdir -p build/coverage/report/native
	$(BIN)/gcovr --root . --filter native/ --exclude native/tests/ build/coverage/native --print-summary \
	    --txt build/coverage/report/native.txt --html-details build/coverage/report/native/index.html

coverage-python: $(VENV)/.coverage
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -m "$$($(BIN)/python tests/ordinary.py)" -n 2 --dist loadgroup $(COVERED) $(PYTEST_ARGS)
	$(BIN)/coverage combine --quiet
	mkdir -p build/coverage/report
	$(BIN)/coverage html --quiet --directory build/coverage/report/python
	$(BIN)/coverage report > build/coverage/report/python.txt
	@echo "vmm: $$($(BIN)/coverage report --format=total) % of lines and branches"

## wheel: one abi3 manylinux wheel in dist, tried in a bare virtual environment
wheel: $(VENV)/.wheel
	rm -rf build/wheel dist/*.whl
	$(BIN)/python -m build --wheel --outdir build/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl
	$(BIN)/abi3audit --strict dist/*.whl
	$(MAKE) try-wheel

## try-wheel: install dist's wheel in a bare virtual environment, and boot the hello guest from it
try-wheel:
	cmake -S guests -B build/guests >/dev/null
	cmake --build build/guests --target hello
	rm -rf build/bare
	$(PYTHON) -m venv build/bare
	build/bare/bin/python -m pip install --quiet dist/*.whl
	cd build/bare && bin/python $(CURDIR)/tests/bare_wheel.py $(CURDIR)/build/guests/bin/hello

## bench: side-by-side figures
bench: setup
	$(BIN)/python bench/run.py
	$(BIN)/python bench/virtio.py
	$(BIN)/python bench/trace.py
	$(BIN)/python bench/rollback.py

# Random images, registers and requests, much longer than in the ordinary suite.
## fuzz: hypothesis, for long
fuzz: setup
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest tests/unit -m hypothesis --timeout 3600 $(PYTEST_ARGS)

# libFuzzer under AddressSanitizer and UBSan: RUNS inputs for each target in native/fuzz. What was found stays in
# build/fuzz/corpus, and the next run goes on from there, and from native/fuzz/seeds; an input that fails is written to
# build/fuzz.
RUNS ?= 1000000
FUZZ_TARGETS = $(patsubst native/fuzz/%.c,%,$(wildcard native/fuzz/fuzz_*.c))
## fuzz-native: libFuzzer over the native half (RUNS=1000000)
fuzz-native:
	cmake -S . -B build/fuzz -DCMAKE_C_COMPILER=clang -DVMM_FUZZ=ON -DVMM_TESTS=OFF -DVMM_GUESTS=OFF >/dev/null
	cmake --build build/fuzz -j2 --target $(FUZZ_TARGETS)
	@for target in $(FUZZ_TARGETS); do \
	    mkdir -p build/fuzz/corpus/$$target; \
	    echo "$$target: $(RUNS) runs"; \
	    build/fuzz/$$target -runs=$(RUNS) -timeout=10 -max_len=1024 -print_final_stats=1 -verbosity=0 \
	        -artifact_prefix=build/fuzz/$$target- build/fuzz/corpus/$$target \
	        $$(ls -d native/fuzz/seeds/$$target 2>/dev/null) || exit 1; \
	done

## clean: remove everything that was built
clean:
	rm -rf build dist *.egg-info vmm/_native*.so vmm/_native.c

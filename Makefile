# pyvmm: everything a person does with the source tree. `make setup` makes the virtual environment the rest uses.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BUILD := build/dev

.PHONY: setup boot test native slow svm svm-smoke svm-shell vmx lint bench fuzz fuzz-native clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml setup.py CMakeLists.txt $(wildcard native/include/*.h) vmm/_ffi/build.py $(wildcard native/*/*.[ch])
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

boot: setup
	$(BIN)/pyvmm boot

# The C half under AddressSanitizer and UBSan, then everything else. Where KVM emulates guest kernel code, a boot of
# Linux takes 15 s and more: most tests that need one of their own are run by `make svm TESTS=tests/linux`.
test: setup native
	$(BIN)/python -m pytest -m "$$($(BIN)/python tests/ordinary.py)" -n 2 --dist loadgroup --durations=25 $(PYTEST_ARGS)

native:
	cmake -S . -B $(BUILD) -DVMM_GUESTS=ON >/dev/null
	cmake --build $(BUILD) -j2
	cd $(BUILD) && ctest --output-on-failure

# A stock distribution kernel: 10-20 minutes where KVM emulates guest kernel code.
slow: setup
	$(BIN)/python -m pytest -m slow --timeout 3600 $(PYTEST_ARGS)

# An ordinary KVM host (SVM) in QEMU's TCG, built from Debian packages: needs no /dev/kvm. TESTS are words for pytest,
# as in make svm TESTS="tests/kvm -k uart"; the results are in build/svm/junit.xml, too.
TESTS ?= tests -m "not slow"
svm: setup
	$(BIN)/python -m tests.svm run $(TESTS)

svm-smoke: setup
	$(BIN)/python -m tests.svm smoke

svm-shell: setup
	$(BIN)/python -m tests.svm shell

# A host with VT-x in Bochs, one slow processor: a smoke test. The results are in build/vmx/junit.xml.
vmx: setup
	$(BIN)/python -m tests.vmx run

# Several conftest.py would have one module name, and tests.svm is imported by its full name: these are named as modules.
TYPED = $(subst /,.,$(patsubst %.py,-m %,$(filter-out %/__init__.py,$(wildcard tests/svm/*.py tests/vmx/*.py \
        tests/conftest.py tests/*/conftest.py tests/unit/*/conftest.py))))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy $(TYPED)
	clang-format --dry-run -Werror $(shell find native -name '*.[ch]')

bench: setup
	$(BIN)/python bench/run.py
	$(BIN)/python bench/virtio.py
	$(BIN)/python bench/trace.py
	$(BIN)/python bench/rollback.py

# Random images, registers and requests, much longer than in the ordinary suite.
fuzz: setup
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest tests/unit -m hypothesis --timeout 3600 $(PYTEST_ARGS)

# libFuzzer under AddressSanitizer and UBSan: RUNS inputs for each target in native/fuzz. What was found stays in
# build/fuzz/corpus, and the next run goes on from there; an input that fails is written to build/fuzz.
RUNS ?= 1000000
FUZZ_TARGETS = $(patsubst native/fuzz/%.c,%,$(wildcard native/fuzz/fuzz_*.c))
fuzz-native:
	cmake -S . -B build/fuzz -DCMAKE_C_COMPILER=clang -DVMM_FUZZ=ON -DVMM_TESTS=OFF -DVMM_GUESTS=OFF >/dev/null
	cmake --build build/fuzz -j2 --target $(FUZZ_TARGETS)
	@for target in $(FUZZ_TARGETS); do \
	    mkdir -p build/fuzz/corpus/$$target; \
	    echo "$$target: $(RUNS) runs"; \
	    build/fuzz/$$target -runs=$(RUNS) -timeout=10 -max_len=1024 -print_final_stats=1 -verbosity=0 \
	        -artifact_prefix=build/fuzz/$$target- build/fuzz/corpus/$$target || exit 1; \
	done

clean:
	rm -rf build dist *.egg-info vmm/_native*.so vmm/_native.c

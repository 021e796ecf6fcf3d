# Every target sets up what it needs; `make bench` and `make test` are all a fresh machine takes.
# With an NVIDIA GPU and a CUDA build of torch installed, the environment uses that build; otherwise it installs one
# for the CPU, and Triton beside it, whose interpreter runs the Triton kernels in the tests.

PYTHON ?= python3
VENV ?= .venv
TORCH_VERSION ?= 2.13.0
TRITON_VERSION ?= 3.9.0
BIN := $(VENV)/bin
OP ?=
ARGS ?=

SYSTEM_CUDA_TORCH := $(shell command -v nvidia-smi >/dev/null && $(PYTHON) -c \
	"import torch; print('yes' if torch.cuda.is_available() else '')" 2>/dev/null)

.PHONY: bench test build lint format typecheck verify count compile-check sanitize new wheel clean

bench: $(VENV)/ready
	$(BIN)/fusewright bench $(if $(OP),--op $(OP)) $(ARGS)

# What only tests use is built before them, or the first that needs it would be as slow.
test: $(VENV)/ready build
	$(BIN)/python -m fusewright_kernels.build emulator cuda_emulated
	$(BIN)/python -m pytest -n auto --dist loadfile $(if $(OP),-k "$(OP)") $(ARGS)

build: $(VENV)/ready
	$(BIN)/python -m fusewright_kernels.build $(if $(filter build,$(MAKECMDGOALS)),$(ARGS))

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

typecheck: $(VENV)/ready
	$(BIN)/mypy

verify: $(VENV)/ready build
	$(BIN)/fusewright verify $(if $(OP),--op $(OP)) $(ARGS)

count: $(VENV)/ready build
	$(BIN)/python -m fusewright_bench.studies.instruction_count $(ARGS)

compile-check: $(VENV)/ready
	$(BIN)/python -m fusewright_kernels.triton_compile_check
	$(BIN)/python -m fusewright_kernels.cuda_compile_check

sanitize: $(VENV)/ready
	$(BIN)/python tests/sanitize.py $(ARGS)

new: $(VENV)/ready
	$(BIN)/python tests/new_op.py $(OP)

wheel: $(VENV)/ready
	$(BIN)/python -m fusewright_kernels.build --prebuilt kernels/fusewright_kernels/prebuilt
	$(BIN)/python -m pip wheel --no-deps -w dist .

clean:
	rm -rf $(VENV) build dist *.egg-info

# nvidia-cutlass brings headers that some tests compare layouts with; what it asks for is not needed.
$(VENV)/ready: pyproject.toml Makefile
ifeq ($(SYSTEM_CUDA_TORCH),yes)
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(BIN)/python -m pip install -q -e '.[bench,test,dev]' || $(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
else
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q torch==$(TORCH_VERSION) triton==$(TRITON_VERSION)
	$(BIN)/python -m pip install -q -e '.[bench,test,dev]'
	$(BIN)/python -m pip install -q --no-deps nvidia-cutlass==4.2.0.0
endif
	touch $@

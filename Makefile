# make demo   make clips, pictures and edits with the miniature models and score them
# make test   lint, format check and tests
# make test-oldest   the tests of the encoders and of downloads with the oldest packages that the pack takes
# make test-requirements   whether pip finds our requirements and ComfyUI's together; needs a package index, takes minutes
# make test-card   PyTorch's build for CUDA on a card made of RAM; brings gigabytes of CUDA, needs cc, takes ten minutes and more
# All set up .venv on their first run. PYTHON=python3.12 chooses another interpreter; make clean starts over.

PYTHON ?= python3
VENV := .venv
CUDA_VENV := .venv-cuda
CUDA_TORCH ?= torch
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check -qq
READY := $(VENV)/.ready

TORCH := $(shell sed -n 's/^torch==//p' requirements-dev.txt)
OLDEST_TRANSFORMERS := $(shell sed -n 's/^transformers>=/transformers==/p' requirements.txt)
OLDEST_HUB := $(shell sed -n 's/^huggingface_hub>=/huggingface_hub==/p' requirements.txt)
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo test test-oldest test-requirements test-card setup clean

demo: $(READY)
	@$(VENV)/bin/python -m wanqwen demo

test: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -q -n 2 --dist loadfile

# Beside the environment's own packages and before them. pip remarks that others there want newer ones; these tests don't.
test-oldest: $(READY)
	@$(PIP) install --upgrade --target $(VENV)/oldest $(OLDEST_TRANSFORMERS)
	PYTHONPATH=$(VENV)/oldest $(VENV)/bin/pytest -q tests/wan/test_text_encoder.py tests/wan/test_image_encoder.py \
	  tests/qwen_image/test_text_encoder.py
	@$(PIP) install --upgrade --target $(VENV)/oldest-hub $(OLDEST_HUB)
	PYTHONPATH=$(VENV)/oldest-hub $(VENV)/bin/pytest -q tests/downloads

test-requirements: $(READY)
	$(VENV)/bin/pytest -q tests/test_requirements.py --resolve

# In an environment of its own, with the newest PyTorch; CUDA_TORCH='torch==2.14.1' takes another that is built for CUDA 13.
test-card: $(READY)
	@test -d $(CUDA_VENV) || $(PYTHON) -m venv $(CUDA_VENV)
	@grep -vE '^(torch|triton|ruff)=' requirements-dev.txt >$(CUDA_VENV)/requirements.txt
	@$(CUDA_VENV)/bin/python -m pip --disable-pip-version-check -qq install $(CUDA_TORCH) nvidia-cuda-crt \
	  -r $(CUDA_VENV)/requirements.txt
	CUDA_PYTHON=$(abspath $(CUDA_VENV))/bin/python $(VENV)/bin/pytest -q tests/card

setup: $(READY)

clean:
	rm -rf $(VENV) $(CUDA_VENV)

$(READY): requirements-dev.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	  echo "No $(PYTHON) here. Install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$$($(PYTHON) --version) is too old: 3.10 or newer is needed. Name another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Setting up $(VENV); this takes minutes the first time."
	@$(CPU_TORCH)
	@$(PIP) install -r requirements-dev.txt
	@$(PIP) install --no-deps --editable .
	@touch $@

# The registry's torch for Linux brings gigabytes of CUDA. Without an NVIDIA GPU, take the CPU build: from where pip
# looks anyway, else from PyTorch's own index. If there is none to be had, requirements-dev.txt installs the usual build.
define CPU_TORCH
if [ "$$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1; then \
  $(PIP) install "torch==$(TORCH)+cpu" >/dev/null 2>&1 || \
  $(PIP) install --retries 1 --timeout 15 --extra-index-url $(TORCH_CPU_INDEX) "torch==$(TORCH)+cpu" >/dev/null 2>&1 || \
  echo "No CPU build of torch $(TORCH) could be had; taking the usual one."; \
fi
endef

# Everything a fresh machine needs: Python >= 3.10 with venv, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench clean

demo: $(VENV)/.runtime  ## restore the embedded sample clip with shipped weights; pictures and a video in demo/
	$(BIN)/python -m restore.demo

test: lint $(VENV)/.dev  ## lint, type check, test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.runtime  ## speed of networks, DCNv2 and a training step, as ratios; results/bench.json
	$(BIN)/python -m bench.table

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# basicsr, torchvision and lpips are referees of the tests; installed so that they pull in no second torch. triton runs
# the GPU kernels in its interpreter; a torch for CUDA has brought its own
$(VENV)/.dev: requirements-dev.txt $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps torchvision==0.28.0 lpips==0.1.4
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation basicsr==1.4.2
	$(BIN)/python -c "import triton" 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps triton==3.9.0 || true
	touch $@

clean:
	rm -rf $(VENV) demo results .pytest_cache .mypy_cache .ruff_cache

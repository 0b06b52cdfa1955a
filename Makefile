# `make` builds everything; `make test` checks everything. Both set the environment up first.

PYTHON ?= python3.11
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONWARNINGS ?= ignore::FutureWarning
JOBS ?= 1# stages at once: docs/machines.md
REPRO := $(if $(filter-out 1,$(JOBS)),python -m stages.build $(JOBS),dvc repro)
# DVC removes a stage's outputs before it runs; where it then fails, the earlier ones come back from the cache.
BACK := { status=$$?; dvc checkout --quiet 2>/dev/null; exit $$status; }

.PHONY: all share assemble test long faults gpu ui serve ask track repository table lock clean

all: .venv/installed
	python -m stages.check
	$(REPRO) || $(BACK)

share: .venv/installed
	python -m stages.check
	$(REPRO) --pull --allow-missing $(TARGETS) || $(BACK)
	dvc push --run-cache

assemble: .venv/installed
	python -m stages.check
	dvc repro --pull || $(BACK)

.venv/installed: requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(shell sed -n 's/^uv==//p' requirements.lock)
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip sync --quiet --compile-bytecode requirements.lock
	touch $@

test: .venv/installed
	ruff format --check .
	ruff check .
	basedpyright
	hadolint Dockerfile
	@# Few files a process, two at a time: of one process with all tests, native libraries bring each other down near its end.
	ls tests/test_*.py | OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive xargs -P 2 -n 8 pytest

long: .venv/installed
	pytest -m long
	python -m tests.exported
	python -m tests.kill

faults: .venv/installed
	python -m tests.faults --faults 200 --seed 0

gpu: .venv/installed
	pytest -m gpu
	python -m benchmarks.training # its record needs `uv pip install --no-deps airbench`
	python -m benchmarks.seeds --launch eager graph
	python -m benchmarks.overparameterize
	python -m benchmarks.revive
	python -m recipes.run compress_cifar10 --seeds 0
	for network in wrn_22_1 resnet_20 vgg16; do python -m benchmarks.compress outputs/recipes/compress_cifar10/$$network/base/full/0/model --tune 2 || exit 1; done
	dvc repro # another machine than before: it profiles again, on CUDA too
	python -m benchmarks.serving --provider cuda --ways raw
	python -m recipes.run kflo_cifar10 'cifar_quick/*' --seeds 0 1 2 # the paper's full schedule; data/raw, or add --data FILE.npz
	python -m recipes.run kflo_cifar10 'vgg16/*' 'wrn_28_2/*' --seeds 0
	python -m recipes.run reactivation_cifar10 resnet_32/baseline resnet_32/reactivation --seeds 0 1 2
	python -m recipes.run restart_cifar10 'mininet/*' --seeds 0
	python -m recipes.run selective_fashion_mnist 'densenet_40/*' --seeds 0
	python -m recipes.run selective_cifar10 'densenet_40/*' 'resnet_164/*' --seeds 0
	python -m recipes.run diet_cifar10 --seeds 0 1 2
	python -m recipes.run reactivation_cifar10 resnet_110/baseline resnet_110/reactivation --seeds 0

ui: .venv/installed
	python -m stages.ui

serve: .venv/installed
	python -m stages.serve

ask: .venv/installed
	@python -m stages.ask "$$PICTURE"

repository: .venv/installed
	dvc repro --single-item --force repository

track: .venv/installed
	dvc repro --single-item --force track

table: .venv/installed
	cat outputs/report/table.md

lock:
	uv pip compile --quiet --universal --python-version 3.11 --group pyproject.toml:dev --no-annotate --no-header --no-emit-index-url --output-file requirements.lock pyproject.toml

clean:
	rm -rf outputs repository .repository.* .venv .triton mlflow.db* .mlflow.db* mlartifacts
	rm -rf .dvc/cache .dvc/tmp

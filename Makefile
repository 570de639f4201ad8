PYTHON ?= python

.PHONY: install test lint demo

install:
	$(PYTHON) -m pip install -e '.[dev]'

test:
	$(PYTHON) -m pytest tests

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

# A detector from nothing: draws scenes, trains, evaluates. Minutes on two CPU cores.
demo:
	rm -rf runs/scenes_retinanet_resnet18
	$(PYTHON) tools/train_det.py configs/scenes_retinanet_resnet18.yaml

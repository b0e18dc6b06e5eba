.PHONY: setup check fast test bench

setup:
	pip install -e '.[dev]'

check:
	ruff check .
	ruff format --check .
	mypy

fast:
	pytest -m "not slow" -n 2 --dist loadfile

test:
	pytest -n 2 --dist loadfile

bench:
	python -m benchmarks.throughput
	python -m benchmarks.text_tower
	python -m benchmarks.retrieval
	python -m benchmarks.captioning
	python -m benchmarks.calibration
	python -m benchmarks.vqa
	python -m benchmarks.integer

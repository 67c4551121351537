# make demo    export, compile, verify and run two models, into demo/
# make test    ruff, and pytest in one process more than there are processors, four at most; one test runs mypy
# make lint    ruff, and mypy with the types of torch
# make test-browser   the pages of serve, publish and report in Chromium, which it installs with Playwright unless there is one
# make test-ray       serve with Ray Serve, which it installs
# make clients   other programs that run our graphs, each in an environment of its own
# make faults    200 faults injected into graphs, each named by `diff`, into build/faults (benchmarks/README.md)
# make fuzz    20,000 changed and hostile inputs (benchmarks/README.md)
# make race    our graphs beside the alternatives on this processor: an hour to prepare, an hour to measure
# make docs    the documentation as a site, into site/
# make clean   remove everything that these made, the environment included
#
# Needs make, bash and Python 3.10 or newer; another interpreter: make test PYTHON=python3.12

SHELL := bash
PYTHON ?= python3
EXTRAS := export,hub,tensorflow,onnxruntime,openvino,tensorrt-rtx,parquet,plots,report,tiff,bench,serve,test
DIGITS := examples/digits
# Some tests wait, for a command or a lock: one process more than processors keeps these busy.
WORKERS := $(shell $(PYTHON) -c 'import os; print(min(4, (os.cpu_count() or 1) + 1))')
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: demo test test-browser test-ray lint clients faults fuzz race docs clean venv

demo: venv
	rm -rf demo
	mkdir demo
	swin-deploy export --weights $(DIGITS)/swinv2-digits -o demo/swinv2-digits
	swin-deploy build-engine demo/swinv2-digits --fp16
	swin-deploy verify demo/swinv2-digits
	swin-deploy predict demo/swinv2-digits $(DIGITS)/images/*.png
	cd demo && swin-deploy export --variant swinv2-tiny --random-weights
	cd demo && swin-deploy build-engine --fp16
	cd demo && swin-deploy verify swinv2-tiny
	cd demo && swin-deploy predict swinv2-tiny ../examples/photos/flower.jpg

test: venv
	ruff check
	ruff format --check
	pytest -n $(WORKERS) --dist worksteal

lint: venv
	ruff check
	ruff format --check
	python tests/architecture/typecheck.py

test-browser: venv
	python -m pip install -q --disable-pip-version-check -c constraints.txt "playwright>=1.50"
	command -v chromium google-chrome >/dev/null || playwright install --with-deps chromium
	npm install --silent --no-save --prefix build/browser "onnxruntime-web@^1.27"
	pytest -n0 tests/serving/test_browser.py tests/publishing/test_web_page.py tests/reporting/test_report_page.py

test-ray: venv
	python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[ray]"
	pytest -n0 tests/serving/test_ray_serve.py

clients: venv
	python -m benchmarks.clients

faults: venv
	python benchmarks/faults.py --work build/faults

fuzz: venv
	python -m benchmarks.fuzz all

race: venv
	python benchmarks/race.py

docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet

clean:
	rm -rf .venv demo site build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find $(wildcard swin_deploy exporters runtimes calib tests examples) -name __pycache__ -prune -exec rm -rf {} +

venv: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "swin-deploy needs Python 3.10 or newer," \
	  "and $(PYTHON) is not. Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments:" \
	  "its venv module is absent. On Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 2; }
	@echo "Installing into .venv; the first time this takes some minutes."
	@$(PYTHON) -m venv .venv
	@python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

.venv/installed-docs: .venv/installed
	@python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch $@

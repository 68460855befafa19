"""The sandbox of the code interpreter and of generated programs: exceeds every limit for real."""

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from qwen.sandbox import Limits, Result, Sandbox, SandboxUnavailable
from tests.support import ROOT

# Added to sys.path, so that `import sandbox` does not import the rest of the library, which takes memory and seconds.
LIBRARY = ROOT / "qwen"
# Small limits, except for the time: the machine may be busy.
LIMITS = Limits(wall_seconds=90, memory_bytes=1 << 30, file_bytes=1 << 20, folder_bytes=8 << 20, folder_files=50)


def can_confine() -> bool:
    """Whether this machine supports the sandbox, checked without its code."""
    command = ["bwrap", "--ro-bind", "/", "/", "--unshare-pid", "--unshare-net", "--proc", "/proc", "true"]
    try:
        ctypes.CDLL("libseccomp.so.2")
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


pytestmark = pytest.mark.skipif(not can_confine(), reason="needs Linux 5.14 with user namespaces, bwrap and libseccomp")


@pytest.fixture(scope="module")
def shared() -> Iterator[Sandbox]:
    with Sandbox(limits=LIMITS) as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(shared: Sandbox) -> Sandbox:
    """The shared session with an empty folder. Variables of earlier tests remain."""
    for path in shared.folder.iterdir():
        if path.is_file():
            path.unlink()
    return shared


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def has_ended(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def value(result: Result) -> object:
    assert result.status == "ok", result.output
    return result.output


def refused(result: Result, *errors: str) -> None:
    assert result.status == "error", result
    assert any(error in result.output for error in errors), result


# A notebook


def test_variables_persist(sandbox: Sandbox) -> None:
    assert value(sandbox.run("x = 6\ndef double(n):\n    return 2 * n")) == ""
    assert value(sandbox.run("double(x)")) == "12"
    assert value(sandbox.run("_ + 1")) == "13"
    assert value(sandbox.run("print('a')\nimport sys\nprint('b', file=sys.stderr)\nNone")) == "a\nb"


@pytest.mark.parametrize("code", ["", "# nothing", "x = 1;", "None", "for i in range(3): i"])
def test_cells_without_a_value(sandbox: Sandbox, code: str) -> None:
    assert value(sandbox.run(code)) == ""


def test_dataclasses_and_pickle_work_for_classes_of_a_cell(sandbox: Sandbox) -> None:
    code = """
    import dataclasses, pickle
    @dataclasses.dataclass
    class P:
        x: int
    pickle.loads(pickle.dumps(P(3)))
    """
    assert value(sandbox.run(dedent(code))) == "P(x=3)"


def test_unicode_surrogates_and_control_sequences(sandbox: Sandbox) -> None:
    assert value(sandbox.run("变量 = 'é你好🎉'; print(变量)")) == "é你好🎉"
    assert value(sandbox.run("print('\\ud800')")) == "\\ud800"
    assert value(sandbox.run("import os; os.write(1, b'\\xff'); None")) == "\\xff"
    assert value(sandbox.run("print('\\x1b[31mred\\x1b[0m \\x07\\x1b]0;title\\x07')")) == "red ]0;title"
    refused(sandbox.run("'\ud800'"), "UnicodeEncodeError")
    refused(sandbox.run("\0"), "null bytes")


def test_traceback_shows_only_the_cell(sandbox: Sandbox) -> None:
    result = sandbox.run("def f(n):\n    return 1 / n\nf(0)")
    assert result.status == "error"
    output = re.sub(r"<cell \d+>", "<cell>", result.output)
    assert output.startswith('Traceback (most recent call last):\n  File "<cell>", line 3, in <module>\n    f(0)\n')
    assert '  File "<cell>", line 2, in f\n    return 1 / n\n' in output
    assert output.endswith("ZeroDivisionError: division by zero")
    assert "worker.py" not in output


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("if:", "SyntaxError"),
        ("'''", "SyntaxError"),
        ("return 3", "SyntaxError"),
        ("no_such_name", "NameError"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("exit()", "SystemExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("def f(): return f()\nf()", "RecursionError"),
        ("input('Name? ')", "EOFError: there is nobody to type"),
        ("import sys; 1 / len(sys.stdin.read())", "ZeroDivisionError"),
        ("class A:\n    def __repr__(self): raise ValueError('no')\nA()", "ValueError: no"),
    ],
)
def test_errors_end_only_the_cell(sandbox: Sandbox, code: str, error: str) -> None:
    sandbox.run("kept = 1")
    refused(sandbox.run(code), error)
    assert value(sandbox.run("kept")) == "1"


def test_cell_can_replace_stdout_and_stderr(sandbox: Sandbox) -> None:
    assert value(sandbox.run("import sys\nsys.stdout = sys.stderr = None\n1")) == ""
    assert value(sandbox.run("sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__\n1")) == "1"


def test_figures_are_saved_to_files(sandbox: Sandbox) -> None:
    pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install matplotlib")
    with Sandbox() as roomy:
        code = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.figure()\nplt.show()"
        assert value(roomy.run(code)) == "[figure saved as figure-1.png]\n[figure saved as figure-2.png]"
        assert value(roomy.run("plt.get_fignums()")) == "[]"
        assert (roomy.folder / "figure-2.png").read_bytes().startswith(b"\x89PNG")


# Time


def test_endless_loop_is_interrupted_and_variables_are_kept() -> None:
    with Sandbox(limits=Limits(wall_seconds=1)) as sandbox:
        sandbox.run("kept = 2")
        result = sandbox.run("while True: pass")
        assert result.status == "interrupted"
        assert "KeyboardInterrupt" in result.output
        assert "[Stopped after 1 seconds. The variables" in result.output
        assert value(sandbox.run("kept")) == "2"


def test_loop_that_ignores_sigint_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen.sandbox.process.INTERRUPT_TIMEOUT", 0.5)
    with Sandbox(limits=Limits(wall_seconds=1)) as sandbox:
        sandbox.run("lost = 1")
        result = sandbox.run("import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass")
        assert result.status == "died"
        assert "it ran for more than 1 seconds" in result.output
        assert "So are all variables; the next cell starts a new one." in result.output
        refused(sandbox.run("lost"), "NameError")
        assert value(sandbox.run("1 + 1")) == "2"


def test_processor_time_is_limited() -> None:
    with Sandbox(limits=Limits(wall_seconds=90, cpu_seconds=1)) as sandbox:
        result = sandbox.run("while True: pass")
        assert result.status == "died"
        assert "more than 1 seconds of processor time" in result.output
        assert value(sandbox.run("1")) == "1"


# Memory, processes, files


def test_memory_bomb_ends_only_the_cell(sandbox: Sandbox) -> None:
    sandbox.run("kept = 3")
    refused(sandbox.run("bomb = 'x' * (4 << 30)"), "MemoryError")
    refused(sandbox.run("bomb = []\nwhile True: bomb.append(bytes(10 << 20))"), "MemoryError")
    refused(sandbox.run("import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))"), "ValueError")
    assert value(sandbox.run("bomb = None; kept")) == "3"


@pytest.mark.parametrize(
    "code",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import os; os.execv('/bin/true', ['true'])",
        "import multiprocessing; multiprocessing.Process(target=print).start()",
        "import ctypes, os\nif ctypes.CDLL(None).vfork() < 0: raise OSError(1, 'Operation not permitted')",
    ],
)
def test_processes_cannot_be_started(sandbox: Sandbox, code: str) -> None:
    refused(sandbox.run(code), "Operation not permitted", "Permission denied")


def test_threads_work_and_are_limited(sandbox: Sandbox) -> None:
    with Sandbox(limits=LIMITS) as sandbox:
        assert (
            value(sandbox.run("import threading as t\na = t.Thread(target=print, args=(5,)); a.start(); a.join()"))
            == "5"
        )
        refused(
            sandbox.run("wait = t.Event()\nwhile True: t.Thread(target=wait.wait, daemon=True).start()"),
            "start new thread",
        )
        assert value(sandbox.run("wait.set(); 1")) == "1"


def test_long_output_is_cut_in_the_middle(sandbox: Sandbox) -> None:
    output = value(sandbox.run("for i in range(200000): print(i)"))
    assert output.startswith("0\n1\n2\n")
    assert output.endswith("\n199998\n199999")
    assert re.search(r"\n\[\.\.\. \d+ bytes left out \.\.\.\]\n", output)
    assert len(output) < 8100
    assert len(value(sandbox.run("'你' * 10**6"))) < 8100


def test_file_size_is_limited(sandbox: Sandbox) -> None:
    refused(sandbox.run("open('huge', 'wb').write(bytes(2 << 20))"), "File too large")
    assert (sandbox.folder / "huge").stat().st_size <= LIMITS.file_bytes


@pytest.mark.parametrize(
    "code", ["open(f'{i}', 'w').close()", "os.mkdir(f'{i}')", "open(f'{i % 40}', 'wb').write(bytes(1 << 20))"]
)
def test_folder_limits_end_only_the_cell(code: str) -> None:
    with Sandbox(limits=LIMITS) as sandbox:
        sandbox.run("kept = open('kept', 'w').write('here')")
        refused(sandbox.run(f"import os\nfor i in range(100):\n    {code}"), "No space left on device")
        assert value(sandbox.run("os.listdir('.').count('kept'), kept")) == "(1, 4)"
        assert len(list(sandbox.folder.iterdir())) <= LIMITS.folder_files


def test_files_of_both_sides_are_the_same() -> None:
    with Sandbox(limits=LIMITS) as sandbox:
        sandbox.run("import os; os.makedirs('a/b'); open('a/b/c', 'w').write('1'); open('d', 'w').write('2')")
        assert (sandbox.folder / "a/b/c").read_text() == "1"
        sandbox.run("os.remove('a/b/c'); open('d', 'w').write('3')")
        assert {path.name: path.read_text() for path in sandbox.folder.iterdir()} == {"d": "3"}
        (sandbox.folder / "d").unlink()
        (sandbox.folder / "e").write_text("4")
        assert value(sandbox.run("os.path.exists('d'), open('e').read()")) == "(False, '4')"
        sandbox.run("open('f', 'w').write('5')\nos._exit(0)")
        assert value(sandbox.run("open('e').read(), open('f').read()")) == "('4', '5')"


def test_failed_copy_keeps_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(source: Path, target: Path, follow_symlinks: bool) -> None:
        target.write_text("n")
        raise OSError(28, "No space left on device")

    (tmp_path / "data").write_text("old")
    with Sandbox(tmp_path, limits=LIMITS) as sandbox:
        sandbox.start()
        monkeypatch.setattr("shutil.copyfile", copy)
        output = value(sandbox.run("open('data', 'w').write('new'); None"))
    assert output == "[1 of the files could not be kept: No space left on device.]"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_open_files_are_limited(sandbox: Sandbox) -> None:
    refused(sandbox.run("files = [open('/dev/null') for _ in range(1000)]"), "Too many open files")


# Access to files, network and other processes


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret.txt"
    path.write_text("hunter2")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(
    "code",
    [
        "open(path).read()",
        "open('/proc/self/root' + path).read()",
        "os.listdir(os.path.dirname(path))",
        "open(path, 'w')",
        "open(path, 'a')",
        "os.truncate(path, 0)",
        "os.unlink(path)",
        "os.rename(path, 'mine')",
        "os.rename(path, path + '2')",
        "os.link(path, 'mine')",
        "os.symlink(path, 'mine')",
        "os.mkfifo('pipe')",
        "os.mkdir(path + '.d')",
        "open(path + '.new', 'w')",
        "open('/tmp/new', 'w')",
        "open(os.path.expanduser('~/../new'), 'w')",
        "os.setxattr(path, 'user.a', b'1')",
        "open(f'/proc/{os.getppid()}/environ').read()",
        "open('/etc/passwd').read()",
        "open('/dev/shm/x', 'w')",
    ],
)
def test_outside_files_are_inaccessible(sandbox: Sandbox, secret: Path, code: str) -> None:
    result = sandbox.run(f"import os\npath = {str(secret)!r}\n{code}")
    refused(result, "PermissionError", "FileNotFoundError", "Read-only file system")
    assert secret.read_text() == "hunter2"
    assert list(secret.parent.iterdir()) == [secret]


def test_attributes_of_outside_files_cannot_be_changed(sandbox: Sandbox, secret: Path) -> None:
    before = secret.stat()
    sandbox.run(f"import os\npath = {str(secret)!r}")
    sandbox.run("os.chmod(path, 0o777)\nos.utime(path, (0, 0))\nos.chown(path, 1, 1)")
    assert secret.stat() == before


def test_file_operations_inside_the_folder_work(sandbox: Sandbox) -> None:
    code = """
    import os, shutil, tempfile
    open('a', 'w').write('你')
    shutil.copy('a', 'b')
    os.rename('b', 'c')
    os.mkdir('d')
    shutil.move('c', 'd/c')
    tempfile.NamedTemporaryFile().close()
    print(os.listdir('d'))
    shutil.rmtree('d')
    os.listdir('.')
    """
    assert value(sandbox.run(dedent(code))) == "['c']\n['a']"


def test_environment_is_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "hunter2")
    with Sandbox() as sandbox:
        output = value(sandbox.run("import os\nprint(dict(os.environ))\nopen('/proc/self/environ').read()"))
        assert "hunter2" not in output
        assert "OPENAI" not in output
        assert str(sandbox.folder) in output


def test_open_files_are_not_inherited(secret: Path) -> None:
    with open(secret) as file, Sandbox() as sandbox:
        os.set_inheritable(file.fileno(), True)
        paths = "(f'/proc/self/fd/{fd}' for fd in range(100))"
        opened = value(sandbox.run(f"import os\n[os.readlink(path) for path in {paths} if os.path.lexists(path)]"))
        assert "/dev/null" in opened
        assert "pipe:" in opened
        assert "secret" not in opened


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_sockets_are_blocked(sandbox: Sandbox, family: int, kind: int) -> None:
    refused(sandbox.run(f"import socket; socket.socket({int(family)}, {int(kind)})"), "PermissionError")


def test_listening_server_is_unreachable(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        refused(sandbox.run(f"import urllib.request as u; u.urlopen('http://127.0.0.1:{port}', timeout=5)"), "URLError")
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize(
    "code", ["os.kill(os.getppid(), 0)", "os.kill(-1, 0)", "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)"]
)
def test_other_processes_cannot_be_signalled(sandbox: Sandbox, code: str) -> None:
    refused(sandbox.run(f"import os; {code}"), "PermissionError")


def test_libraries_work(sandbox: Sandbox) -> None:
    assert value(sandbox.run("import asyncio, random, sqlite3; asyncio.run(asyncio.sleep(0, 'slept'))")) == "'slept'"
    assert value(sandbox.run("import numpy; numpy.linalg.inv(numpy.eye(99)).sum() == 99")) in ("True", "np.True_")


# End of the process


JUNK = """
import os
for fd in range(3, 4096):
    try: os.write(fd, {!r})
    except OSError: pass
"""


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os._exit(4)", "it left with exit status 4"),
        ("import os; os.abort()", "signal "),  # 6, or 11 as process 1, which cannot signal itself
        ("import ctypes; ctypes.string_at(0)", "signal 11"),
        ("import os; os.closerange(0, 100)", ""),
        (JUNK.format(b"junk\n"), "its answer made no sense"),
        (JUNK.format(b"[" * 60000 + b"\n"), "its answer made no sense"),
        (JUNK.format(b'{"cell": 99, "status": "ok"}\n'), "its answer made no sense"),
        (JUNK.format(b'{"missing": []}\n'), "its answer made no sense"),
    ],
)
def test_ended_process_is_replaced(code: str, reason: str) -> None:
    with Sandbox(limits=LIMITS) as sandbox:
        sandbox.run("lost = 1")
        result = sandbox.run(f"print('before')\n{code}")
        assert result.status == "died"
        assert "before" in result.output
        assert f"[The interpreter is gone: {reason}" in result.output
        assert "all variables" in result.output
        refused(sandbox.run("lost"), "NameError")


def test_close_removes_folder_and_process() -> None:
    sandbox = Sandbox()
    sandbox.run("open('a', 'w').write('x')")
    folder, pid = sandbox.folder, sandbox.process.popen.pid
    assert folder.is_dir()
    assert folder.stat().st_mode & 0o077 == 0
    sandbox.close()
    sandbox.close()
    assert not folder.exists()
    assert not Path(f"/proc/{pid}").exists()


def test_given_folder_is_kept(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("1,2\n")
    for _ in range(2):
        with Sandbox(tmp_path) as sandbox:
            assert value(sandbox.run("open('data.csv').read()\nopen('out', 'a').write('x')")) == "1"
    assert (tmp_path / "out").read_text() == "xx"
    assert (tmp_path / "data.csv").read_text() == "1,2\n"


def test_concurrent_sessions_share_nothing() -> None:
    results: dict[int, str] = {}

    def session(number: int) -> None:
        with Sandbox() as sandbox:
            sandbox.run(f"x = {number}")
            results[number] = sandbox.run("import os\nopen(str(x), 'w').close()\n(x, os.listdir('.'))").output

    threads = [threading.Thread(target=session, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: f"({number}, ['{number}'])" for number in range(3)}


def test_ctrl_c_ends_the_cell_and_the_process() -> None:
    with Sandbox() as sandbox:
        sandbox.start()
        pid = sandbox.process.popen.pid
        begun = sandbox.process.files / "begun"
        interrupt = threading.Thread(target=lambda: (wait_until(begun.exists), os.kill(os.getpid(), signal.SIGINT)))
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            sandbox.run("open('begun', 'w').close()\nwhile True: pass")
        interrupt.join()
        assert not Path(f"/proc/{pid}").exists()
        assert value(sandbox.run("1")) == "1"


def test_process_ends_with_its_parent() -> None:
    code = f"""
    import sys
    sys.path.insert(0, {str(LIBRARY)!r})
    from sandbox import Sandbox
    sandbox = Sandbox()
    sandbox.start()
    print(sandbox.process.popen.pid, sandbox.folder, flush=True)
    sandbox.run("while True: pass")
    """
    parent = subprocess.Popen([sys.executable, "-c", dedent(code)], stdout=subprocess.PIPE, text=True)
    pid, folder = parent.stdout.readline().split()
    try:
        assert not has_ended(int(pid))
        parent.kill()
        wait_until(lambda: has_ended(int(pid)))
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
        os.rmdir(folder)


# Machines without support


def test_missing_bubblewrap_needs_allow_weaker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with Sandbox() as sandbox, pytest.raises(SandboxUnavailable, match=r"the code: bubblewrap is not installed"):
        sandbox.run("1")
    with Sandbox(allow_weaker=True) as sandbox:
        assert value(sandbox.run("6 * 7")) == "42"
        assert any("read and change all that you can" in sentence for sentence in sandbox.missing_protections)
        assert not any("network" in sentence for sentence in sandbox.missing_protections)
        refused(sandbox.run("import socket; socket.socket()"), "PermissionError")
        refused(sandbox.run("import os; os.fork()"), "PermissionError")


def test_lower_existing_limits_are_kept() -> None:
    code = f"""
    import resource, sys
    sys.path.insert(0, {str(LIBRARY)!r})
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (40, 40))
    from sandbox import Sandbox
    with Sandbox() as sandbox:
        print(sandbox.run("import resource as r; r.getrlimit(r.RLIMIT_AS)[1], r.getrlimit(r.RLIMIT_CPU)[1]").output)
    """
    done = subprocess.run([sys.executable, "-c", dedent(code)], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == f"({1 << 30}, 40)\n"


def test_old_name_of_missing_protections() -> None:
    with Sandbox() as sandbox, pytest.warns(DeprecationWarning, match=r"Sandbox\.missing is now"):
        assert sandbox.missing is sandbox.missing_protections


def test_windows_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen.sandbox.os.name", "nt")
    with pytest.raises(SandboxUnavailable, match="WSL"):
        Sandbox()


def test_error_if_the_process_cannot_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("qwen.sandbox.process.sys.executable", str(tmp_path / "no-python"))
    with Sandbox() as sandbox, pytest.raises(SandboxUnavailable, match="no-python"):
        sandbox.run("1")

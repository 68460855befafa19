"""Attacks on the sandbox, each as root and as an ordinary user, with bubblewrap and without.

Every attack runs in a program of its own, which starts the sandbox as `user` and prints what it sees outside. With
`confinement`, the promise also holds in the weaker sandbox, which has no namespaces and only runs on request.
"""

import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from textwrap import dedent

import pytest

from tests.support import ROOT

from .test_sandbox import can_confine, has_ended, wait_until

NOBODY = 65534
PRELUDE = f"""
import json, os, resource, shutil, signal, socket, subprocess, sys, tempfile, threading, time
from pathlib import Path
from textwrap import dedent
sys.path.insert(0, {str(ROOT / "qwen")!r})
from sandbox import Limits, Result, Sandbox, SandboxUnavailable
if sys.argv[1] == "seccomp":
    shutil.which = lambda name: None
# Small limits, except for the time: the machine may be busy.
def start(**limits):
    limits = {{"wall_seconds": 60, "memory_bytes": 1 << 30, "folder_bytes": 8 << 20, "folder_files": 50, **limits}}
    return Sandbox(limits=Limits(**limits), allow_weaker=sys.argv[1] == "seccomp")
"""

pytestmark = [
    pytest.mark.skipif(not can_confine(), reason="needs Linux 5.14 with user namespaces, bwrap and libseccomp"),
    pytest.mark.slow,
]


@cache
def python_for(user: str) -> list[str]:
    """Return the command of a Python that the user can start."""
    if user == "root":
        if os.getuid():
            pytest.skip("needs root")
        return [sys.executable]
    if os.getuid():
        return [sys.executable]
    command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    for python in (sys.executable, shutil.which("python3", path="/usr/bin:/usr/local/bin")):
        check = "import os, sys; sys.exit(sys.version_info < (3, 11) or not os.access(sys.executable, os.X_OK))"
        if python and not subprocess.run([*command, python, "-c", check], capture_output=True, check=False).returncode:
            return [*command, python]
    pytest.skip("needs a Python 3.11 that an ordinary user can start")


@pytest.fixture(params=["root", "nobody"])
def user(request: pytest.FixtureRequest) -> str:
    python_for(request.param)
    return request.param


@pytest.fixture(params=["bubblewrap", "seccomp"])
def confinement(request: pytest.FixtureRequest) -> str:
    return request.param


def host(user: str, script: str, confinement: str = "bubblewrap", *, prefix: tuple[str, ...] = ()) -> str:
    """Run a program that uses the sandbox; return what it prints."""
    command = [*python_for(user)[:-1], *prefix, python_for(user)[-1], "-c", PRELUDE + dedent(script), confinement]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Time


def test_half_an_answer_does_not_stop_the_clock(user: str, confinement: str) -> None:
    script = r"""
    code = '''
    import os, time
    for fd in range(3, 10):
        try: os.write(fd, b"{")
        except OSError: pass
    time.sleep(10**6)
    '''
    with start(wall_seconds=1) as sandbox:
        print(sandbox.run(dedent(code)).status, sandbox.run("1").output)
    """
    assert host(user, script, confinement) == "died 1"


def test_code_behind_a_forged_answer_is_stopped(user: str, confinement: str) -> None:
    script = r"""
    code = '''
    import os, threading
    def work():
        while True: open("written", "a").write("x")
    threading.Thread(target=work, daemon=True).start()
    while not os.path.exists("written"): pass
    for fd in range(3, 10):
        try: os.write(fd, b'{"cell": 1, "status": "ok"}\\n')
        except OSError: pass
    while True: pass
    '''
    with start() as sandbox:
        print(sandbox.run(dedent(code)).status, end=" ")
        clock = (~sandbox.process.pid << 3) | 2
        while Path(f"/proc/{sandbox.process.pid}/stat").read_text().split()[2] != "T": time.sleep(0.01)
        before, size = time.clock_gettime(clock), (sandbox.folder / "written").stat().st_size
        time.sleep(0.3)
        print(time.clock_gettime(clock) - before < 0.1, (sandbox.folder / "written").stat().st_size == size, end=" ")
    """
    assert host(user, script, confinement) == "ok True True"


def test_timer_does_not_continue_the_process_between_cells(user: str, confinement: str) -> None:
    script = r"""
    code = '''
    import ctypes, signal, struct, threading
    def work():
        while True: pass
    threading.Thread(target=work, daemon=True).start()
    librt, timer = ctypes.CDLL(None), ctypes.c_void_p()
    event = struct.pack("qii", 0, signal.SIGCONT, 0) + bytes(64)
    created = librt.timer_create(0, event, ctypes.byref(timer))
    if created == 0: librt.timer_settime(timer, 0, struct.pack("qqqq", 0, 10**7, 0, 10**7), None)
    created
    '''
    with start() as sandbox:
        print(sandbox.run(dedent(code)).output, end=" ")
        stat = Path(f"/proc/{sandbox.process.pid}/stat")
        while stat.read_text().split()[2] != "T": time.sleep(0.01)
        states = set()
        for _ in range(30):
            time.sleep(0.01)
            states.add(stat.read_text().split()[2])
        print(states)
    """
    assert host(user, script, confinement) == "-1 {'T'}"


def test_processor_time_cannot_be_raised(user: str, confinement: str) -> None:
    script = """
    with start(cpu_seconds=1) as sandbox:
        code = "import resource; resource.setrlimit(resource.RLIMIT_CPU, (-1, -1))\\nwhile True: pass"
        print("more than 1 seconds of processor time" in sandbox.run(code).output)
    """
    assert host(user, script, confinement) == "True"


def test_process_does_not_outlive_the_host(user: str, confinement: str) -> None:
    script = """
    code = '''
    import ctypes
    libc = ctypes.PyDLL(None)
    libc.prctl(1, 0, 0, 0, 0)  # PR_SET_PDEATHSIG: none
    open("begun", "w").close()
    libc.sleep(600)
    '''
    with start() as sandbox:
        sandbox.start()
        child = os.fork()
        if child == 0:  # the host: starts its own, and is killed while C code holds the GIL in the sandbox
            with start() as sandbox:
                sandbox.start()
                print(sandbox.process.pid, sandbox.folder, flush=True)
                begun = (sandbox.process.files or sandbox.folder) / "begun"
                def kill():
                    while not begun.exists(): time.sleep(0.01)
                    while Path(f"/proc/{sandbox.process.pid}/stat").read_text().split()[2] != "S": time.sleep(0.01)
                    os.kill(os.getpid(), signal.SIGKILL)
                threading.Thread(target=kill).start()
                sandbox.run(dedent(code))
        os.waitpid(child, 0)
    """
    pid, folder = host(user, script, confinement).split()
    shutil.rmtree(folder)
    wait_until(lambda: has_ended(int(pid)))


# Memory, files, threads


def test_memory_is_limited(user: str, confinement: str) -> None:
    script = r"""
    code = '''
    import ctypes, mmap, os, resource
    errors = []
    libc = ctypes.CDLL(None, use_errno=True)
    def fill():
        filled = []
        while True: filled.append(bytes(10 << 20))
    for step in (lambda: "x" * (4 << 30), fill, lambda: mmap.mmap(-1, 4 << 30), lambda: os.memfd_create("x"),
                 lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1))):
        try: step()
        except Exception as error: errors.append(type(error).__name__)
    # System V memory; a page of 2 MiB in a pipe; pipes of 1 MiB, of which all programs of the user have 64 together.
    pipe = os.pipe()
    for call in (lambda: libc.shmget(0, 4096, 0o1600), lambda: libc.vmsplice(pipe[1], bytes(16), 1, 0),
                 lambda: libc.fcntl(pipe[1], 1031, 1 << 20)):
        if call() < 0: errors.append(ctypes.get_errno())
    errors
    '''
    with start() as sandbox:
        print(sandbox.run(dedent(code)).output, sandbox.run("1").output)
    """
    errors = ["MemoryError", "MemoryError", "OSError", "PermissionError", "ValueError", 1, 1, 1]
    assert host(user, script, confinement) == f"{errors} 1"


@pytest.mark.parametrize(
    ("code", "error"),
    [
        # More than the limit in files that are deleted and open, in many files, in folders, in a file of /dev.
        ("for i in range(24): f[i] = open('x', 'wb', 0); os.unlink('x'); f[i].write(bytes(1 << 20))", 28),
        ("for i in range(100): open(str(i), 'w').close()", 28),
        ("for i in range(66000): os.mkdir(str(i))", 28),
        ("open('/dev/shm/x', 'w')", 2),
        ("open('/dev/x', 'w')", 30),
        ("open('/x', 'w')", 30),
    ],
)
def test_files_and_folders_are_limited(user: str, code: str, error: int) -> None:
    script = f"""
    with start() as sandbox:
        print(sandbox.run({"import os; f = {}" + chr(10) + code!r}).output.splitlines()[-1])
        print(sandbox.run("f.clear(); 1").output, len(os.listdir(sandbox.folder)) <= 50)
    """
    assert f"[Errno {error}]" in (output := host(user, script))
    assert output.endswith("1 True")


def test_thread_that_writes_on_fills_no_disk(user: str) -> None:
    script = r"""
    code = '''
    import threading
    def work():
        for i in range(1000):
            try: open(f"{i % 40}", "wb").write(bytes(1 << 20))
            except OSError: pass
    threading.Thread(target=work).start()
    '''
    with start() as sandbox:
        statuses = {sandbox.run(dedent(code)).status, *(sandbox.run("1").status for _ in range(5))}
        print(statuses, sum(path.stat().st_size for path in sandbox.folder.iterdir()) <= 8 << 20)
    """
    assert host(user, script) == "{'ok'} True"


def test_deep_folders_do_not_break_the_host(user: str) -> None:
    script = r"""
    with start(folder_files=2000) as sandbox:
        print(sandbox.run("import os\nfor _ in range(1200):\n    os.mkdir('d'); os.chdir('d')").status, end=" ")
        print(sandbox.run("open('f', 'w').write('x'); open('/proc/self/cwd/g', 'w').write('x'); 1").output, end=" ")
    print(sandbox.folder.exists())
    """
    assert host(user, script) == "ok 1 False"


def test_deep_folders_of_the_weaker_sandbox_are_removed(user: str) -> None:
    script = r"""
    with start() as sandbox:
        print(sandbox.run("import os\nfor _ in range(1200):\n    os.mkdir('d'); os.chdir('d')").status, end=" ")
        print(sandbox.run("1").output, end=" ")
    print(sandbox.folder.exists())
    """
    assert host(user, script, "seccomp") == "ok 1 False"


def test_sparse_files_do_not_fill_the_disk(user: str) -> None:
    script = r"""
    with start() as sandbox:
        code = "for i in range(20): open(str(i), 'wb').truncate(4 << 20)"
        print(sandbox.run(code).output, sum(path.stat().st_size for path in sandbox.folder.iterdir()) <= 8 << 20)
    """
    assert host(user, script) == "[18 of the files could not be kept: more than 8 MiB.] True"


def test_links_in_the_folder_are_not_followed(user: str) -> None:
    script = r"""
    folder, outside = (Path(tempfile.mkdtemp()) for _ in range(2))
    (outside / "file").write_text("mine")
    (folder / "link").symlink_to(outside / "file")
    (folder / "folder").symlink_to(outside)
    os.link(outside / "file", folder / "hard")
    with Sandbox(folder) as sandbox:
        print(sandbox.run("import os; print(os.listdir('.')); os.mkdir('folder')"
            "\nfor name in 'link', 'hard', 'folder/file': open(name, 'w').write('theirs')").output)
    print((outside / "file").read_text(), os.listdir(outside), sorted(os.listdir(folder)))
    shutil.rmtree(folder); shutil.rmtree(outside)
    """
    listed, note, after = host(user, script).splitlines()
    assert listed == "['hard']"
    assert note == "[1 of the files could not be kept: File exists.]"
    assert after == "mine ['file'] ['folder', 'hard', 'link']"


def test_files_behind_links_are_not_removed(user: str) -> None:
    script = r"""
    folder, outside = (Path(tempfile.mkdtemp()) for _ in range(2))
    (outside / "file").write_text("mine")
    (folder / "link").symlink_to(outside)
    (folder / "other").symlink_to(outside / "file")
    with Sandbox(folder, limits=Limits(folder_bytes=8 << 20)) as sandbox:
        sandbox.run("import os; os.mkdir('link'); open('link/file', 'w').close()")
        sandbox.run("for name in 'other', 'other2': open(name, 'w').truncate(7 << 20)")
        sandbox.run("os.remove('link/file'); os.remove('other'); os.remove('other2')")
    print(os.listdir(outside), (folder / "link").is_symlink())
    shutil.rmtree(folder); shutil.rmtree(outside)
    """
    assert host(user, script) == "['file'] True"


def test_files_with_hostile_names_and_kinds(user: str) -> None:
    script = r"""
    folder = Path(tempfile.mkdtemp())
    os.mkfifo(folder / "fifo")
    socket.socket(socket.AF_UNIX).bind(str(folder / "socket"))
    os.symlink("/dev/zero", folder / "zero")
    open(os.fsencode(folder) + b"/\xff\n\x1b[2J", "w").write("1")
    with Sandbox(folder) as sandbox:
        code = r'''
    import os
    print(sorted(os.listdir(b'.')))
    open(b'\xfe\n', 'w').write('2')
    os.mkdir('.sandbox-copy'); os.mkdir('closed'); open('closed/x', 'w').close(); os.chmod('closed', 0)
    open('a' * 255, 'w').write('3'); open('set', 'w').close(); os.chmod('set', 0o6777)
    '''
        result = sandbox.run(dedent(code))
        print(result.output)
        (folder / "new").write_text("4")
        print(sandbox.run("print(open('new').read())").output)
    names = [b"a" * 255, b"fifo", b"new", b"set", b"socket", b"zero", b"\xfe\n", b"\xff\n\x1b[2J"]
    print(sorted({*os.listdir(os.fsencode(folder))} - {b"closed"}) == names, os.stat(folder / "set").st_mode & 0o6111)
    shutil.rmtree(folder)
    """
    listed, new, names = host(user, script).splitlines()
    assert (listed, new, names) == (r"[b'\xff\n\x1b[2J']", "4", "True 0")


def test_changes_of_the_user_during_a_cell_are_kept(user: str) -> None:
    script = r"""
    folder = Path(tempfile.mkdtemp())
    for name in "read", "removed": (folder / name).write_text("old")
    (folder / "private").touch(0o600)
    with Sandbox(folder) as sandbox:
        sandbox.start()
        def change():
            while not (sandbox.process.files / "begun").exists(): time.sleep(0.01)
            for name in "read", "removed", "added": (folder / name).write_text("changed")
            (sandbox.process.files / "changed").touch()
        thread = threading.Thread(target=change)
        thread.start()
        code = '''
    import os
    open("begun", "w").close(); os.remove("removed"); open("private", "w").write("x")
    while not os.path.exists("changed"): pass
    '''
        sandbox.run(dedent(code))
        thread.join()
        print(sandbox.run("[open(name).read() for name in ('read', 'removed', 'added')]").output)
    print((folder / "removed").read_text(), oct((folder / "private").stat().st_mode & 0o777))
    shutil.rmtree(folder)
    """
    assert host(user, script) == "['changed', 'changed', 'changed']\nchanged 0o600"


def test_code_that_leaves_no_room_for_new_files_is_ended(user: str) -> None:
    script = r"""
    folder = Path(tempfile.mkdtemp())
    with Sandbox(folder, limits=Limits(folder_bytes=8 << 20)) as sandbox:
        code = '''
    import os
    file = open('x', 'wb', 0); os.remove('x')
    try:
        while True: file.write(bytes(4096))
    except OSError: pass
    '''
        print(sandbox.run(dedent(code)).output)
        (folder / "new").write_text("mine")
        print(sandbox.run("open('new').read(), 'file' in globals()").output)
    shutil.rmtree(folder)
    """
    assert host(user, script).splitlines() == [
        "('mine', False)",
        "[The new files of the folder did not fit beside those of the code: all variables are gone.]",
    ]


def test_failed_copy_keeps_the_old_file(user: str) -> None:
    script = r"""
    folder = Path(tempfile.mkdtemp())
    (folder / "data").write_text("old")
    with Sandbox(folder) as sandbox:
        sandbox.start()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # as a disk that is full
        print(sandbox.run("open('data', 'wb').write(bytes(2 << 20)); None").output)
    print([path.read_text() for path in folder.iterdir()])
    shutil.rmtree(folder)
    """
    assert host(user, script).splitlines() == ["[1 of the files could not be kept: File too large.]", "['old']"]


def test_folder_that_is_too_large_is_refused(user: str) -> None:
    script = r"""
    folder = Path(tempfile.mkdtemp())
    for i in range(100): (folder / f"{i}").write_text("x")
    try:
        with Sandbox(folder, limits=Limits(folder_files=50)) as sandbox: sandbox.start()
    except SandboxUnavailable as error:
        print(error)
    print(len(os.listdir(folder)))
    shutil.rmtree(folder)
    """
    error, count = host(user, script).splitlines()
    assert "does not fit into the sandbox (No space left on device): leave at most 256 MiB and 50 files in it." in error
    assert count == "100"


def test_threads_are_limited(user: str) -> None:
    script = r"""
    code = '''
    import threading
    threading.stack_size(32768)
    wait, count = threading.Event(), 0
    while count < 3000:
        threading.Thread(target=wait.wait, daemon=True).start(); count += 1
    '''
    with start() as sandbox:
        result = sandbox.run(dedent(code))
        print("can't start new thread" in result.output, int(sandbox.run("count").output) < 64)
    """
    assert host(user, script) == "True True"


# Other processes


def test_memory_of_others_is_closed(user: str, confinement: str) -> None:
    script = r"""
    code = '''
    import os
    for pid in os.listdir("/proc"):
        if pid.isdigit() and int(pid) != os.getpid():
            try: print(open(f"/proc/{pid}/environ").read(), end="")
            except OSError: pass
            try: print("opened", os.open(f"/proc/{pid}/mem", os.O_RDONLY))
            except OSError: pass
    '''
    with start() as sandbox:
        print(sandbox.run(dedent(code)).output)
    """
    assert host(user, script, confinement) == ""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers of the system calls are those of x86-64")
def test_system_calls_that_reach_others(user: str, confinement: str) -> None:
    script = r"""
    code = '''
    import ctypes
    libc, n = ctypes.CDLL(None, use_errno=True), ctypes.c_long
    calls = {
        "ptrace": (101, 16, VICTIM), "process_vm_readv": (310, VICTIM, 0, 0, 0, 0, 0),
        "process_vm_writev": (311, VICTIM, 0, 0, 0, 0, 0), "migrate_pages": (256, VICTIM, 0, 0, 0),
        "move_pages": (279, VICTIM, 0, 0, 0, 0, 0), "kcmp": (312, VICTIM, VICTIM, 0, 0, 0),
        "prlimit64": (302, VICTIM, 7, 0, 0), "pidfd_open": (434, VICTIM, 0), "tkill": (200, VICTIM, 9),
        "pidfd_send_signal": (424, 0, 9, 0, 0), "sched_setscheduler": (144, 0, 1, bytes(4)),
        "fsopen": (430, b"tmpfs", 0), "open_tree": (428, -100, b".", 1), "bpf": (321, 0, 0, 0),
        "move_mount": (429, -100, b".", -100, b"/", 0), "perf_event_open": (298, bytes(128), 0, -1, -1, 0),
        "userfaultfd": (323, 1), "keyctl": (250, 0, -3, 0, 0, 0), "add_key": (248, b"user", b"x", b"x", 1, -3),
        "seccomp": (317, 1, 0, 0), "landlock_create_ruleset": (444, bytes(8), 8, 0),
        # of which all programs of the machine or the user share a number
        "io_uring_setup": (425, 1, bytes(120)), "io_setup": (206, 60000, bytes(8)), "inotify_init": (253,),
        "inotify_init1": (294, 0), "fanotify_init": (300, 0, 0),
        # not forbidden, but of no use: no flags to look at, no rights, nothing to give
        "clone3": (435, 0, 88), "open_by_handle_at": (304, -100, bytes(64), 0), "process_mrelease": (448, 0, 0),
    }
    for name, call in calls.items():
        result = libc.syscall(*(n(x) if isinstance(x, int) else x for x in call))
        if result >= 0 or ctypes.get_errno() != 1: print(name, result, ctypes.get_errno(), end=", ")
    '''
    with start() as sandbox:
        print(sandbox.run(dedent(code.replace("VICTIM", str(os.getpid())))).output)
    """
    assert host(user, script, confinement) == "clone3 -1 38, open_by_handle_at -1 22, process_mrelease -1 9,"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86-64 has other tables of system calls")
@pytest.mark.parametrize(
    "instructions",
    [
        "b802000000 cd80 c3",  # mov eax, 2; int 0x80; ret: fork of i386
        "b839000040 0f05 c3",  # mov eax, 0x40000039; syscall; ret: fork of x32
        "b829000040 0f05 c3",  # socket of x32
    ],
)
def test_system_calls_of_other_tables_end_the_process(user: str, confinement: str, instructions: str) -> None:
    script = f"""
    code = '''
    import ctypes, mmap
    memory = mmap.mmap(-1, 4096, prot=7)
    memory.write(bytes.fromhex("{instructions}"))
    ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))()
    '''
    with start() as sandbox:
        print("signal 31: Bad system call" in sandbox.run(dedent(code)).output, sandbox.run("1").output)
    """
    assert host(user, script, confinement) == "True 1"


def test_programs_cannot_be_started(user: str, confinement: str) -> None:
    script = r"""
    code = '''
    import ctypes, multiprocessing, os, subprocess, sys
    libc = ctypes.CDLL(None, use_errno=True)
    for step in (os.fork, libc.vfork, lambda: subprocess.run([sys.executable]), lambda: os.execv(sys.executable, ["x"]),
                 lambda: os.posix_spawn(sys.executable, ["x"], {}), lambda: os.system("true") and -1,
                 lambda: multiprocessing.get_context("fork").Process(target=print).start()):
        try: print(step())
        except PermissionError: print("refused")
    '''
    with start() as sandbox:
        print(*sandbox.run(dedent(code)).output.split())
    """
    assert host(user, script, confinement) == "refused -1 refused refused refused -1 refused"


def test_no_signal_leaves(user: str, confinement: str) -> None:
    script = r"""
    code = '''
    import fcntl, os, struct
    errors = []
    for command, value in (8, VICTIM), (15, struct.pack("ii", 1, VICTIM)), (10, 9):
        r, w = os.pipe()
        try:
            fcntl.fcntl(r, command, value)
            fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
            os.write(w, b"x")
        except OSError as error: errors.append(error.errno)
    for ioctl in 0x8901, 0x8902:
        try: fcntl.ioctl(__import__("socket").socketpair()[0], ioctl, struct.pack("i", VICTIM))
        except OSError as error: errors.append(error.errno)
    for call in lambda: os.kill(VICTIM, 9), lambda: os.kill(-1, 9), lambda: os.killpg(VICTIM, 9):
        try: call()
        except OSError as error: errors.append(error.errno)
    errors
    '''
    victim = subprocess.Popen(["sleep", "100"], start_new_session=True)
    with start() as sandbox:
        print(sandbox.run(dedent(code.replace("VICTIM", str(victim.pid)))).output, victim.poll())
    victim.kill()
    """
    assert host(user, script, confinement) == "[1, 1, 1, 1, 1, 1, 1, 1] None"


def test_scheduling_of_others_is_unchanged(user: str, confinement: str) -> None:
    script = r"""
    code = '''
    import os
    for call in (lambda: os.sched_setaffinity(VICTIM, {0}),
                 lambda: os.sched_setscheduler(VICTIM, os.SCHED_IDLE, os.sched_param(0)),
                 lambda: os.setpriority(os.PRIO_PROCESS, VICTIM, 19)):
        try: call()
        except OSError as error: print(type(error).__name__, end=" ")
    '''

    def state(): return os.sched_getaffinity(0), os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)
    before = state()
    with start() as sandbox:
        print(sandbox.run(dedent(code.replace("VICTIM", str(os.getpid())))).output)
    print(state() == before)
    """
    assert host(user, script, confinement) == "PermissionError PermissionError PermissionError \nTrue"


def test_locks_and_leases_do_not_hold_up_others(user: str, confinement: str) -> None:
    script = r"""
    import fcntl, glob
    path = next(path for path in glob.glob("/usr/lib/*/libc.so.6") + glob.glob("/usr/lib/*/libm.so.6"))
    code = '''
    import fcntl
    file = open(PATH)
    fcntl.flock(file, fcntl.LOCK_EX)
    try: fcntl.fcntl(file, 1024, fcntl.F_RDLCK)
    except OSError as error: print(error.errno)
    '''
    with start() as sandbox:
        print(sandbox.run(dedent(code.replace("PATH", repr(path)))).output)
        fcntl.flock(open(path), fcntl.LOCK_EX | fcntl.LOCK_NB)
    """
    assert host(user, script, confinement) == "1"


# Network and sockets


def test_no_datagram_leaves(user: str, confinement: str) -> None:
    script = r"""
    code = '''
    import socket
    for kind in socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET, socket.SOCK_STREAM:
        try:
            a, b = socket.socketpair(socket.AF_UNIX, kind)
            for step in (lambda: a.sendto(b"hello", ADDRESS), lambda: a.connect(ADDRESS), lambda: a.bind("\\0sandbox")):
                try: step()
                except OSError: pass
        except OSError: pass
    '''
    folder = tempfile.mkdtemp()
    for address in f"{folder}/socket", f"\0sandbox-{os.getpid()}":
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver, start() as sandbox:
            receiver.bind(address)
            sandbox.run(dedent(code.replace("ADDRESS", repr(address))))
            receiver.settimeout(0.1)
            try: print(receiver.recv(100))
            except TimeoutError: print("nothing")
    shutil.rmtree(folder)
    """
    assert host(user, script, confinement) == "nothing\nnothing"


def test_no_connection_leaves(user: str, confinement: str) -> None:
    script = r"""
    with socket.create_server(("127.0.0.1", 0)) as server, start() as sandbox:
        code = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=5)"
        print(sandbox.run(code).output.splitlines()[-1])
        server.settimeout(0.1)
        try: print(server.accept())
        except TimeoutError: print("nothing")
    """
    assert host(user, script, confinement).endswith("Operation not permitted\nnothing")


# Files and identity


def test_nothing_of_the_host_is_inherited(user: str, confinement: str) -> None:
    script = r"""
    file = tempfile.NamedTemporaryFile()
    os.set_inheritable(file.fileno(), True)
    os.environ["API_KEY"] = "hunter2"
    with start() as sandbox:
        code = '''
    import os, sys
    print("hunter2" in open("/proc/self/environ").read() + str(os.environ), repr(sys.stdin.read()))
    paths = [f"/proc/self/fd/{fd}" for fd in range(100)]
    print(sorted({os.readlink(path).split(":")[0] for path in paths if os.path.lexists(path)}))
    '''
        print(sandbox.run(dedent(code)).output)
    """
    assert host(user, script, confinement).splitlines() == ["False ''", "['/dev/null', 'pipe']"]


def test_nothing_of_the_user_is_visible(user: str) -> None:
    script = f"""
    home = Path(tempfile.mkdtemp())
    (home / "secret").write_text("hunter2")
    os.environ["HOME"], os.environ["API_KEY"] = str(home), "hunter2"
    with start() as sandbox:
        code = '''
    import os
    def exists(path):
        try: return bool(os.listdir(path)) if os.path.isdir(path) else bool(open(path, "rb").read(1))
        except OSError: return False
    paths = [{str(ROOT / "README.md")!r}, HOME, HOME + "/secret", "/proc/self/root" + HOME, "/etc/passwd", "/home",
        "/etc/shadow", "/var", "/run", "/boot", "/proc/HOST/environ", "/proc/HOST/root", "/dev/vda", "/sys/class"]
    print([path for path in paths if exists(path)])
    print([pid for pid in os.listdir("/proc") if pid.isdigit()], "hunter2" in str(os.environ))
    print(len(open("/proc/self/net/tcp").readlines()), len(open("/proc/self/net/unix").readlines()))
    '''
        code = code.replace("HOME", repr(str(home))).replace("HOST", str(os.getpid()))
        print(sandbox.run(dedent(code)).output)
    shutil.rmtree(home)
    """
    processes = ["1", "2"] if user == "root" and not os.getuid() else ["1"]
    assert host(user, script).splitlines() == ["[]", f"{processes} False", "1 1"]


def test_code_has_no_privileges(user: str, confinement: str) -> None:
    script = r"""
    code = '''
    import ctypes, os
    libc = ctypes.CDLL(None, use_errno=True)
    def call(name, *arguments): return getattr(libc, name)(*arguments) and ctypes.get_errno()
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    print([status[name].strip() for name in ("CapEff", "CapPrm", "CapInh", "CapAmb", "NoNewPrivs")], os.getuid() != 0)
    print(all((call("unshare", 0x10000000), call("unshare", 0x20000), call("setns", 0, 0), call("chroot", b"."),
        call("mount", b"x", b".", b"tmpfs", 0, None), call("umount2", b".", 2), call("setuid", 0))))
    '''
    with start() as sandbox:
        print(sandbox.run(dedent(code)).output)
    """
    zero, root = "0" * 16, confinement == "seccomp" and user == "root" and not os.getuid()
    assert host(user, script, confinement).splitlines() == [f"{[zero] * 4 + ['1']} {not root}", str(not root)]


def test_files_can_be_moved_between_folders(user: str, confinement: str) -> None:
    script = r"""
    with start() as sandbox:
        code = "import os; open('a', 'w').close(); os.mkdir('b'); os.rename('a', 'b/a'); os.listdir('b')"
        print(sandbox.run(code).output)
    """
    assert host(user, script, confinement) == "['a']"


# Machines without support


def test_root_without_other_users() -> None:
    script = (
        'with start() as sandbox: print(sandbox.run(\'open("f", "w").write("x")\').output, *os.listdir(sandbox.folder))'
    )
    assert host("nobody", script, prefix=("unshare", "--map-root-user", "--")) == "1 f"


def test_code_is_not_run_without_user_namespaces(user: str) -> None:
    script = r"""
    try:
        with Sandbox() as sandbox: sandbox.run("1")
    except SandboxUnavailable as error:
        print(error)
    with Sandbox(allow_weaker=True) as sandbox:
        print(sandbox.run("6 * 7").output, *sandbox.missing_protections, sep="\n")
    """
    prefix = ("bwrap", "--unshare-user", "--disable-userns", "--dev-bind", "/", "/", "--cap-drop", "ALL", "--")
    refusal, result, *missing = host(user, script, prefix=prefix).splitlines()
    assert refusal.startswith("This machine cannot confine the code: ")
    assert "bwrap: " in refusal
    assert result == "42"
    assert missing[:3] == [
        "The code can read and change all that you can.",
        "Its files, folders and threads are not limited.",
        "It sees the other programs and their connections.",
    ]

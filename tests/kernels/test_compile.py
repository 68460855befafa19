"""Compilation of the kernels: where something is missing or broken, one line says so, and torch computes.

Most tests compile a source of one line, in their own folders.
"""

import grp
import logging
import os
import pwd
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen.kernels import compile as compilation
from qwen.kernels import cpu
from qwen.kernels.compile import KernelsUnavailable, compiled_library, load_library
from tests.support import ROOT
from tests.support.processes import Child, run_script

SMALL = "int self_test(void) { return 1; }\n"
NOBODY = 65534  # the user id of `nobody`
NEEDS_ROOT = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of the libraries, and a source that compiles at once."""
    folder, source = tmp_path / "cache", tmp_path / "kernels.c"
    source.write_text(SMALL)
    monkeypatch.setattr(compilation, "SOURCE", source)
    monkeypatch.setenv("QWEN_KERNELS_CACHE", str(folder))
    monkeypatch.delenv("CC", raising=False)
    return folder


@pytest.fixture
def write_compiler(tmp_path, monkeypatch):
    """Returns a function that installs a shell script as the compiler."""

    def write(script: str) -> Path:
        path = tmp_path / "compiler"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("CC", str(path))
        return path

    return write


def reason() -> str:
    """Return why there is no library; a single line."""
    with pytest.raises(KernelsUnavailable) as caught:
        load_library()
    message = str(caught.value)
    assert "\n" not in message
    return message


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.so"))


def leftovers(folder: Path) -> list[Path]:
    """Return what is in the folder besides libraries and locks."""
    return [path for path in folder.iterdir() if path.suffix not in (".so", ".lock")]


def test_it_compiles_once(cache, write_compiler, tmp_path):
    write_compiler(f'echo "$@" >> {tmp_path}/calls; exec gcc "$@"')
    assert load_library().self_test() == 1
    assert compiled_library() == compiled_library()
    assert (tmp_path / "calls").read_text().count("-O3") == 1
    assert len(libraries(cache)) == 1
    assert not leftovers(cache)
    assert cache.stat().st_mode & 0o777 == 0o700


def test_another_source_compiler_option_or_processor_has_another_library(cache, tmp_path, monkeypatch):
    paths = [compiled_library()]
    monkeypatch.setenv("CC", "gcc -DOTHER")
    paths.append(compiled_library())
    compilation.SOURCE.write_text(SMALL + "int more;\n")
    paths.append(compiled_library())
    monkeypatch.setattr(compilation, "processor", lambda: "another one")
    paths.append(compiled_library())
    assert libraries(cache) == sorted(set(paths))
    assert len(set(paths)) == 4


# -- Compilers --


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "no C compiler was found" in reason()


@pytest.mark.parametrize("command", ["no-such-compiler -m64", 'gcc "', "/"])
def test_a_compiler_that_is_none(monkeypatch, command):
    monkeypatch.setenv("CC", command)
    assert f"CC={command}" in reason()


def test_a_compiler_that_fails(cache):
    compilation.SOURCE.write_text("int self_test(void) { return one; }\n")
    assert "cannot compile kernels.c: " in reason()
    assert "'one' undeclared" in reason()
    assert not libraries(cache)
    assert not leftovers(cache)


@pytest.mark.parametrize("script", ["exit 3", "kill -9 $$", r"printf '\377\376\n' >&2; exit 1"])
def test_a_compiler_that_fails_without_a_word(write_compiler, script):
    path = write_compiler(script)
    assert f"{path} cannot compile kernels.c: " in reason()


def test_a_compiler_that_hangs(cache, write_compiler, monkeypatch):
    """Also what it has started ends: a process that holds its output open would be waited for."""
    monkeypatch.setattr(compilation, "COMPILE_SECONDS", 0.5)
    write_compiler('case "$1" in --version) ;; *) sleep 1000 & wait;; esac')
    assert "timed out" in reason()
    assert not leftovers(cache)
    write_compiler("sleep 1000 & wait")
    assert "timed out" in reason()


@pytest.mark.parametrize("script", ["true", "head -c 5000 /dev/urandom > $output", "cp /dev/null $output"])
def test_a_compiler_that_writes_garbage(cache, write_compiler, script):
    find_output = 'while [ "$#" -gt 0 ] && [ "$1" != -o ]; do shift; done; output=$2'
    write_compiler(f'{find_output}; [ -z "$output" ] || {script}')
    assert "does not run on this processor" in reason()
    assert not libraries(cache)


def test_a_library_with_instructions_that_the_processor_lacks(cache):
    """The process that tries it is killed, and no other."""
    compilation.SOURCE.write_text("int self_test(void) { __builtin_trap(); }\n")
    assert "does not run on this processor (status -" in reason()
    assert not libraries(cache)


def test_clang(write_compiler, monkeypatch):
    write_compiler("echo clang version 19.1.0")
    monkeypatch.setattr(sys, "platform", "linux")
    assert "is Clang" in reason()
    assert "CC=gcc" in reason()


# -- Folders --


def test_a_folder_that_cannot_be_created(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QWEN_KERNELS_CACHE", str(tmp_path / "file" / "cache"))
    assert f"the folder {tmp_path}/file/cache for compiled code cannot be used" in reason()
    monkeypatch.setenv("QWEN_KERNELS_CACHE", "/proc/qwen")  # read-only, also for root
    assert "/proc/qwen" in reason()


def test_the_default_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("QWEN_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert compiled_library().parent == tmp_path / "xdg" / "qwen" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compiled_library().parent == tmp_path / ".cache" / "qwen" / "kernels"


def test_a_user_without_a_home(monkeypatch):
    monkeypatch.delenv("QWEN_KERNELS_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    assert "cannot be used: Could not determine home directory" in reason()


@pytest.mark.parametrize("part", ["cache", "cache/kernels"])
def test_a_folder_that_others_can_write_to(cache, monkeypatch, part):
    monkeypatch.setenv("QWEN_KERNELS_CACHE", str(cache / "kernels"))
    compiled_library()
    folder = cache.parent / part
    folder.chmod(0o777)
    assert reason().startswith(f"others own or can write to {folder}. ")
    folder.chmod(0o1777)  # as /tmp: what is in it cannot be replaced
    if part == "cache":
        compiled_library()
    else:
        assert "can write to" in reason()


def test_a_folder_that_a_group_can_write_to(cache, monkeypatch):
    """Allowed for the group that a system makes for each user: everything there belongs to it."""
    compiled_library()
    cache.chmod(0o770)
    user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(cache.stat().st_gid)
    if (user.pw_name, user.pw_gid, []) == (group.gr_name, group.gr_gid, group.gr_mem):
        compiled_library()
    monkeypatch.setattr(pwd, "getpwuid", lambda number: SimpleNamespace(pw_name="another", pw_gid=user.pw_gid))
    assert "can write to" in reason()


def test_a_link_to_a_folder_of_others(cache, monkeypatch, tmp_path):
    """The folder counts that it leads to."""
    target = tmp_path / "target"
    target.mkdir()
    cache.symlink_to(target)
    assert compiled_library().parent == target
    target.chmod(0o777)
    assert f"can write to {target}" in reason()


@NEEDS_ROOT
def test_a_folder_of_another_user(cache):
    cache.mkdir()
    os.chown(cache, NOBODY, -1)
    assert f"others own or can write to {cache}" in reason()


def compile_as_nobody() -> str:
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    try:
        return str(compiled_library())
    except KernelsUnavailable as error:
        return str(error)


@NEEDS_ROOT
@pytest.mark.process
def test_a_read_only_folder_of_root(cache, tmp_path, monkeypatch):
    """It takes a library that root has compiled ahead, and does not compile one."""
    for folder in [*tmp_path.parents[:3], tmp_path]:
        if folder != Path("/tmp"):
            folder.chmod(0o755)
    child = Child(tmp_path, in_small_setting, compile_as_nobody, str(tmp_path), QWEN_KERNELS_CACHE=str(cache))
    assert "cannot be used" in child.result()
    cache.mkdir()
    cache.chmod(0o755)
    child = Child(tmp_path, in_small_setting, compile_as_nobody, str(tmp_path), QWEN_KERNELS_CACHE=str(cache))
    assert "Permission denied" in child.result()
    library = compiled_library()
    library.chmod(0o755)
    child = Child(tmp_path, in_small_setting, compile_as_nobody, str(tmp_path), QWEN_KERNELS_CACHE=str(cache))
    assert child.result() == str(library)


def in_small_setting(function, folder: str):
    """Call a function in a process that compiles the source of one line."""
    compilation.SOURCE = Path(folder, "kernels.c")
    return function()


def compile_on_full_disk() -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # no file may be longer
    try:
        return str(compiled_library())
    except KernelsUnavailable as error:
        return str(error)


@pytest.mark.process
def test_a_full_disk(cache, tmp_path):
    child = Child(tmp_path, in_small_setting, compile_on_full_disk, str(tmp_path), QWEN_KERNELS_CACHE=str(cache))
    assert "cannot compile kernels.c" in child.result()
    assert not libraries(cache)
    assert not leftovers(cache)


# -- Libraries --


@pytest.mark.parametrize("damage", [b"", b"\x7fELF and nothing else", None])
def test_a_damaged_library_is_compiled_again(cache, damage):
    path = compiled_library()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert load_library().self_test() == 1
    assert compiled_library().read_bytes() == whole


def test_a_library_compiled_ahead_needs_no_compiler(monkeypatch):
    path = compiled_library()
    monkeypatch.setenv("PATH", "")
    assert compiled_library() == path
    assert load_library().self_test() == 1
    monkeypatch.setattr(compilation, "processor", lambda: "another one")
    assert "no C compiler was found" in reason()


def compile_here() -> str:
    return str(compiled_library())


@pytest.mark.process
def test_two_processes_compile_once(cache, write_compiler, tmp_path):
    """The second one waits for the first, whose compiler waits until both run."""
    compiler = write_compiler(
        f'[ "$1" = --version ] && {{ echo >> {tmp_path}/asked; exit; }}\n'
        f"echo >> {tmp_path}/calls\n"
        f"until [ $(wc -l < {tmp_path}/asked) -ge 2 ]; do sleep 0.02; done\n"
        'exec gcc "$@"'
    )
    variables = {"QWEN_KERNELS_CACHE": str(cache), "CC": str(compiler)}
    arguments = in_small_setting, compile_here, str(tmp_path)
    children = [Child(tmp_path, *arguments, log=tmp_path / f"{i}.txt", **variables) for i in range(2)]
    assert [child.result() for child in children] == 2 * [str(path) for path in libraries(cache)]
    assert (tmp_path / "calls").read_text() == "\n"


def test_a_lock_that_is_never_released(cache, monkeypatch):
    monkeypatch.setattr(compilation, "LOCK_SECONDS", 0.1)
    cache.mkdir(mode=0o700)
    key = compilation.library_key(compilation.find_compiler())
    with compilation.FileLock(cache / f"{key}.lock"):
        assert "could not be acquired" in reason()
    compiled_library()


# -- In use --


def test_it_can_be_switched_off(cache, monkeypatch):
    monkeypatch.setenv("QWEN_KERNELS", "torch")
    assert reason() == "QWEN_KERNELS=torch"
    assert not cache.exists()


def test_a_warning_of_one_line(monkeypatch, caplog):
    """Once, and not for each layer or model."""
    monkeypatch.setenv("PATH", "")
    with caplog.at_level(logging.WARNING):
        function = cpu.cpu_kernels.__wrapped__
        assert function() is None
    assert [record.getMessage() for record in caplog.records] == [
        "torch computes replies, which takes longer on a CPU: no C compiler was found. "
        "Installing one (`apt install gcc`) makes replies on the CPU faster."
    ]


@pytest.mark.process
def test_compiling_ahead(cache):
    """The command, with the real source."""
    command = [sys.executable, "-m", "qwen.kernels.compile"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert [done.stdout.strip()] == [str(path) for path in libraries(cache)]


def test_compiling_ahead_without_a_compiler(monkeypatch, capsys):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert compilation.main() == 1
    assert capsys.readouterr().err == (
        "The kernels are not available: the compiler CC=no-such-compiler was not found. "
        "Unset CC, or name one that is installed.\n"
    )


QUESTION = "What is your name?\n"


@pytest.mark.process
def test_the_demo_answers_without_a_compiler(bundled_chat):
    """The same reply, and one line that says why it takes longer."""
    words = ("cli_demo.py", "-c", bundled_chat)
    with_kernels = run_script(*words, text=QUESTION)
    assert with_kernels.returncode == 0
    for variables, line in [
        ({"CC": "no-such-compiler"}, "CC=no-such-compiler was not found"),
        ({"QWEN_KERNELS": "torch"}, "QWEN_KERNELS=torch"),
        ({"QWEN_KERNELS_CACHE": "/proc/qwen"}, "the folder /proc/qwen for compiled code cannot be used"),
    ]:
        without = run_script(*words, text=QUESTION, **variables)
        assert without.returncode == 0
        assert without.stdout == with_kernels.stdout
        lines = [text for text in without.stderr.splitlines() if text not in with_kernels.stderr.splitlines()]
        assert len(lines) == 1
        assert line in lines[0]

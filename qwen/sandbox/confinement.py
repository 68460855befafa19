"""Takes rights away from the process that calls it, for good. It must have one thread: another would keep its rights.

Revolves around `confine`: after it, this process has little memory and few files, can write to one folder and read the
libraries, and can start no process, open no socket and signal nobody. It needs no privileges. What the kernel cannot
do here it returns as sentences; it knows nothing of cells, pipes, or what to do about such a sentence.

On Linux the kernel does the work: Landlock for files (https://docs.kernel.org/userspace-api/landlock.html), seccomp for
system calls, through libseccomp (https://github.com/seccomp/libseccomp). The two packages for this on PyPI are an alpha
release and one of 2021; the calls made here are the C interfaces, which stay as they are.
"""

import ctypes
import errno
import os
import resource
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

# Landlock: system calls (the same numbers everywhere), and the rights of its third version, of Linux 6.2, the first
# that covers truncation.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
LANDLOCK_VERSION = 3
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE, _, MAKE_DIR, MAKE_REG = (
    1 << bit for bit in range(9)
)
REFER, TRUNCATE = 1 << 13, 1 << 14
ALL_RIGHTS = (1 << 15) - 1
READ = READ_FILE | READ_DIR
# No symbolic links, pipes or devices: whoever opens the folder afterwards should find plain files.
READ_AND_WRITE = READ | WRITE_FILE | TRUNCATE | REFER | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG
ON_A_FILE = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE  # the other rights are about folders

# What a Python program reads besides its own folder. Not all of /proc: the command lines of others may hold passwords.
READABLE = (
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share", "/usr/local/share", "/nix/store"),
    *("/etc/fonts", "/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types", "/etc/nsswitch.conf", "/etc/timezone"),
    *("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"),
    *("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu"),
)

# seccomp: actions and comparisons of libseccomp, and who gets them.
ALLOW, NOT_EQUAL, GREATER, MASKED_EQUAL = 0x7FFF0000, 1, 6, 7
CLONE_THREAD = 0x10000
FORBIDDEN = (
    "socket",  # socketpair stays: an asyncio loop wakes itself through one
    *("fork", "vfork", "execve", "execveat"),
    *("ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "kcmp"),
    *("tkill", "rt_sigqueueinfo", "pidfd_open", "pidfd_getfd", "pidfd_send_signal", "setpriority", "ioprio_set"),
    *("memfd_create", "memfd_secret", "shmget", "msgget", "semget", "mq_open"),  # memory outside the limit
    *("add_key", "request_key", "keyctl"),
    *("io_uring_setup", "bpf", "perf_event_open", "userfaultfd", "unshare", "setns"),
    *("inotify_add_watch", "fanotify_init", "setxattr", "lsetxattr", "fsetxattr", "setxattrat"),
    *("removexattr", "lremovexattr", "fremovexattr", "removexattrat"),
)
# Landlock does not cover these, and shutil.copy calls them: they do nothing and say that all is well.
PRETENDED = (
    *("chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat"),
    *("utime", "utimes", "utimensat", "futimesat"),
)

SET_NO_NEW_PRIVS = 38  # prctl; both Landlock and seccomp ask for it
CAPABILITY_VERSION = 0x20080522


def confine(folder: Path, *, memory_bytes: int, file_bytes: int, open_files: int) -> list[str]:
    """Leave this process what a calculation needs; nothing of it can be undone.

    Args:
        folder: the one place where it may write.
        memory_bytes: of address space.
        file_bytes: of one file.

    Returns:
        What is not in force, a sentence each; empty where everything is.
    """
    missing = []
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: open_files,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        try:
            set_limit(limit, value, value)
        except (OSError, ValueError):
            missing.append(f"A limit is not in force (resource limit {limit}).")
    if sys.platform != "linux":
        missing.append("It can read and write your files and use the network: only Linux can forbid that here.")
    else:
        libc = ctypes.CDLL(None, use_errno=True)
        _drop_privileges(libc)
        try:
            _restrict_files(libc, folder)
        except OSError as error:
            missing.append(f"It can read and write your files: Landlock of Linux 6.2 or newer is not there ({error}).")
        try:
            _filter_system_calls()
        except OSError as error:
            missing.append(f"It can use the network and start programs: seccomp is not there ({error}).")
    return missing


def set_limit(limit: int, soft: int, hard: int) -> None:
    """Set a resource limit, or keep a hard one that is lower already."""
    _, current = resource.getrlimit(limit)
    if current != resource.RLIM_INFINITY:
        soft, hard = min(soft, current), min(hard, current)
    resource.setrlimit(limit, (soft, hard))


def forbid_processes() -> None:
    """Where seccomp cannot: no further process, and no further thread either. It does not bind root."""
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def _call(libc: ctypes.CDLL, *arguments: int | ctypes.Array | bytes | None) -> int:
    result = libc.syscall(*(ctypes.c_long(x) if isinstance(x, int) else x for x in arguments))
    if result < 0:
        raise OSError(code := ctypes.get_errno(), os.strerror(code))
    return result


def _drop_privileges(libc: ctypes.CDLL) -> None:
    """What root may do beyond other users goes: mounting, rebooting, reading everybody's files."""
    if libc.prctl(SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))):
        raise OSError(ctypes.get_errno(), "no_new_privs cannot be set")
    if libc.capset(struct.pack("Ii", CAPABILITY_VERSION, 0), bytes(24)):
        raise OSError(ctypes.get_errno(), "the capabilities cannot be dropped")


def _restrict_files(libc: ctypes.CDLL, folder: Path) -> None:
    version = _call(libc, CREATE_RULESET, None, 0, 1)
    if version < LANDLOCK_VERSION:
        raise OSError(errno.ENOSYS, f"this kernel has version {version}, needed is {LANDLOCK_VERSION}")
    handled = struct.pack("Q", ALL_RIGHTS)
    ruleset = _call(libc, CREATE_RULESET, handled, len(handled), 0)
    try:
        rules: list[tuple[str | Path, int]] = [(path, READ) for path in _readable()]
        rules += [("/dev/null", WRITE_FILE), (folder, READ_AND_WRITE)]
        for path, rights in rules:
            try:
                place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except (FileNotFoundError, PermissionError):
                continue
            try:
                allowed = rights if os.path.isdir(path) else rights & ON_A_FILE
                _call(libc, ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed, place), 0)
            finally:
                os.close(place)
        _call(libc, RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _readable() -> Iterator[str]:
    yield from READABLE
    for prefix in {sys.prefix, sys.base_prefix}:  # not the whole folder: an environment may lie among a user's files
        yield from (os.path.join(prefix, name) for name in ("lib", "lib64", "share"))


class _Comparison(ctypes.Structure):
    """`struct scmp_arg_cmp`"""

    _fields_ = [("argument", ctypes.c_uint), ("operator", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]


def _filter_system_calls() -> None:
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(ALLOW)))
    if not context:
        raise OSError("libseccomp cannot start")

    def answer(code: int, name: str, *condition: int) -> None:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number == -1:  # younger than this libseccomp
            return
        comparisons = (_Comparison * 1)(_Comparison(*condition)) if condition else None
        action = ctypes.c_uint32(0x00050000 | code)
        if failed := library.seccomp_rule_add_array(context, action, number, len(comparisons or ()), comparisons):
            raise OSError(-failed, f"no rule for {name}")

    try:
        for name in FORBIDDEN:
            answer(errno.EPERM, name)
        for name in PRETENDED:
            answer(0, name)
        answer(errno.EPERM, "clone", 0, MASKED_EQUAL, CLONE_THREAD, 0)
        answer(errno.ENOSYS, "clone3")  # its flags are out of a filter's sight; the C library then takes clone
        for name in ("kill", "tgkill", "rt_tgsigqueueinfo"):
            answer(errno.EPERM, name, 0, NOT_EQUAL, os.getpid())
        answer(errno.EPERM, "prlimit64", 0, GREATER, 0)
        if failed := library.seccomp_load(context):
            raise OSError(-failed, os.strerror(-failed))
    finally:
        library.seccomp_release(context)

"""Irreversibly confines the calling process. It must be single-threaded: other threads would keep their rights.

After `confine`, the process has limited memory and open files, can write to one folder and read the libraries, and
cannot start processes, open sockets or signal other processes. No privileges are needed. Protections that the kernel
does not support are returned as sentences.

On Linux this uses Landlock for files (https://docs.kernel.org/userspace-api/landlock.html) and seccomp for system
calls, through libseccomp (https://github.com/seccomp/libseccomp). The two PyPI packages for this are an alpha release
and one of 2021, so the stable C interfaces are called directly.
"""

import ctypes
import errno
import os
import resource
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

# Landlock: system call numbers (the same on all architectures), and the rights of ABI version 3 (Linux 6.2), the first
# that covers truncation.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
LANDLOCK_VERSION = 3
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE, _, MAKE_DIR, MAKE_REG = (
    1 << bit for bit in range(9)
)
REFER, TRUNCATE = 1 << 13, 1 << 14
ALL_RIGHTS = (1 << 15) - 1
READ = READ_FILE | READ_DIR
# No symbolic links, pipes or devices: the folder must only contain plain files when it is opened afterwards.
READ_AND_WRITE = READ | WRITE_FILE | TRUNCATE | REFER | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG
FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE  # the other rights apply to folders only

# Paths that Python programs read besides their folder. Not all of /proc: command lines of others may contain passwords.
READABLE_PATHS = (
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share", "/usr/local/share", "/nix/store"),
    *("/etc/fonts", "/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types", "/etc/nsswitch.conf", "/etc/timezone"),
    *("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"),
    *("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu"),
)

# seccomp: actions and comparisons of libseccomp, and the system calls they apply to.
ALLOW, NOT_EQUAL, GREATER, MASKED_EQUAL = 0x7FFF0000, 1, 6, 7
CLONE_THREAD = 0x10000
FORBIDDEN_SYSCALLS = (
    "socket",  # socketpair is allowed: asyncio event loops use one to wake up
    *("fork", "vfork", "execve", "execveat"),
    *("ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "kcmp"),
    *("tkill", "rt_sigqueueinfo", "pidfd_open", "pidfd_getfd", "pidfd_send_signal", "setpriority", "ioprio_set"),
    *("memfd_create", "memfd_secret", "shmget", "msgget", "semget", "mq_open"),  # memory that the limit does not cover
    *("add_key", "request_key", "keyctl"),
    *("io_uring_setup", "bpf", "perf_event_open", "userfaultfd", "unshare", "setns"),
    *("inotify_add_watch", "fanotify_init", "setxattr", "lsetxattr", "fsetxattr", "setxattrat"),
    *("removexattr", "lremovexattr", "fremovexattr", "removexattrat"),
)
# Not covered by Landlock, but called by shutil.copy: they do nothing and report success.
NO_OP_SYSCALLS = (
    *("chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat"),
    *("utime", "utimes", "utimensat", "futimesat"),
)

SET_NO_NEW_PRIVS = 38  # prctl option, required by Landlock and seccomp
CAPABILITY_VERSION = 0x20080522


def confine(folder: Path, *, memory_bytes: int, file_bytes: int, open_files: int) -> list[str]:
    """Confine this process irreversibly to what calculations need.

    Args:
        folder: the only folder it may write to.
        memory_bytes: maximum address space.
        file_bytes: maximum size of a file.
        open_files: maximum number of open files.

    Returns:
        The protections that are not in force, one sentence each; empty if all are.
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
            missing.append(f"Resource limit {limit} cannot be set.")
    if sys.platform != "linux":
        missing.append("The code can read and write your files and use the network: blocking that needs Linux.")
    else:
        libc = ctypes.CDLL(None, use_errno=True)
        _drop_privileges(libc)
        try:
            _restrict_files(libc, folder)
        except OSError as error:
            missing.append(f"The code can read and write your files: Landlock (Linux 6.2+) is not available ({error}).")
        try:
            _filter_syscalls()
        except OSError as error:
            missing.append(f"The code can use the network and start programs: seccomp is not available ({error}).")
    return missing


def set_limit(limit: int, soft: int, hard: int) -> None:
    """Set a resource limit, but never raise it above the current hard limit."""
    _, current = resource.getrlimit(limit)
    if current != resource.RLIM_INFINITY:
        soft, hard = min(soft, current), min(hard, current)
    resource.setrlimit(limit, (soft, hard))


def forbid_processes() -> None:
    """Forbid new processes and threads where seccomp is not available. Has no effect for root."""
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def _syscall(libc: ctypes.CDLL, *arguments: int | ctypes.Array | bytes | None) -> int:
    result = libc.syscall(*(ctypes.c_long(x) if isinstance(x, int) else x for x in arguments))
    if result < 0:
        raise OSError(code := ctypes.get_errno(), os.strerror(code))
    return result


def _drop_privileges(libc: ctypes.CDLL) -> None:
    """Drop all capabilities, so that root cannot mount, reboot or read other users' files."""
    if libc.prctl(SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))):
        raise OSError(ctypes.get_errno(), "no_new_privs cannot be set")
    if libc.capset(struct.pack("Ii", CAPABILITY_VERSION, 0), bytes(24)):
        raise OSError(ctypes.get_errno(), "the capabilities cannot be dropped")


def _restrict_files(libc: ctypes.CDLL, folder: Path) -> None:
    version = _syscall(libc, CREATE_RULESET, None, 0, 1)
    if version < LANDLOCK_VERSION:
        raise OSError(errno.ENOSYS, f"this kernel has Landlock version {version}, {LANDLOCK_VERSION} is required")
    handled = struct.pack("Q", ALL_RIGHTS)
    ruleset = _syscall(libc, CREATE_RULESET, handled, len(handled), 0)
    try:
        rules: list[tuple[str | Path, int]] = [(path, READ) for path in _readable_paths()]
        rules += [("/dev/null", WRITE_FILE), (folder, READ_AND_WRITE)]
        for path, rights in rules:
            try:
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except (FileNotFoundError, PermissionError):
                continue
            try:
                allowed = rights if os.path.isdir(path) else rights & FILE_RIGHTS
                _syscall(libc, ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed, fd), 0)
            finally:
                os.close(fd)
        _syscall(libc, RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _readable_paths() -> Iterator[str]:
    yield from READABLE_PATHS
    for prefix in {sys.prefix, sys.base_prefix}:  # not the whole folder: an environment may contain user files
        yield from (os.path.join(prefix, name) for name in ("lib", "lib64", "share"))


class _Comparison(ctypes.Structure):
    """`struct scmp_arg_cmp`."""

    _fields_ = [("argument", ctypes.c_uint), ("operator", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]


def _filter_syscalls() -> None:
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(ALLOW)))
    if not context:
        raise OSError("libseccomp cannot be initialized")

    def return_errno(code: int, name: str, *condition: int) -> None:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number == -1:  # unknown to this libseccomp version
            return
        comparisons = (_Comparison * 1)(_Comparison(*condition)) if condition else None
        action = ctypes.c_uint32(0x00050000 | code)
        if failed := library.seccomp_rule_add_array(context, action, number, len(comparisons or ()), comparisons):
            raise OSError(-failed, f"cannot add a rule for {name}")

    try:
        for name in FORBIDDEN_SYSCALLS:
            return_errno(errno.EPERM, name)
        for name in NO_OP_SYSCALLS:
            return_errno(0, name)
        return_errno(errno.EPERM, "clone", 0, MASKED_EQUAL, CLONE_THREAD, 0)
        return_errno(errno.ENOSYS, "clone3")  # filters cannot see its flags; libc then falls back to clone
        for name in ("kill", "tgkill", "rt_tgsigqueueinfo"):
            return_errno(errno.EPERM, name, 0, NOT_EQUAL, os.getpid())
        return_errno(errno.EPERM, "prlimit64", 0, GREATER, 0)
        if failed := library.seccomp_load(context):
            raise OSError(-failed, os.strerror(-failed))
    finally:
        library.seccomp_release(context)

"""Irreversibly confines the calling process, the last step before it runs code. Imported by the worker only.

The process must be single-threaded: other threads would keep their rights. In bubblewrap's namespaces (`isolated`) this
adds what bubblewrap does not limit: files and folders, threads, system calls. Without them it is all there is.

System calls are filtered through libseccomp's C interface; its packages on the index are not maintained.
"""

import ctypes
import errno
import os
import resource
import signal
import struct
import sys

SET_DEATH_SIGNAL, SET_DUMPABLE, SET_NO_NEW_PRIVS = 1, 4, 38  # prctl options
# seccomp: actions and comparisons of libseccomp, and the system calls they apply to.
ALLOW, RETURN_ERRNO = 0x7FFF0000, 0x00050000
NOT_EQUAL, MASKED_EQUAL = 1, 7
FORBIDDEN_SYSCALLS = (
    *("socket", "connect", "bind", "listen", "accept", "accept4"),  # socketpair: asyncio's event loops use one
    *("fork", "vfork", "execve", "execveat", "unshare", "setns"),
    *("symlink", "symlinkat", "mknod", "mknodat"),  # the folder must only contain plain files when it is copied
    *("ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "kcmp", "migrate_pages", "move_pages"),
    *("tkill", "rt_sigqueueinfo", "pidfd_open", "pidfd_getfd", "pidfd_send_signal"),
    *("sched_setscheduler", "sched_setparam", "sched_setattr", "setpriority", "ioprio_set"),
    "timer_create",  # its signal may be SIGCONT, which would continue the process between cells
    # Memory that the limit does not cover. A piece of a page in a pipe (vmsplice) keeps the whole page.
    *("memfd_create", "memfd_secret", "shmget", "msgget", "semget", "mq_open", "vmsplice"),
    *("seccomp", "landlock_create_ruleset", "add_key", "request_key", "keyctl", "bpf", "perf_event_open"),
    *("userfaultfd", "io_uring_setup", "io_setup", "inotify_init", "inotify_init1", "fanotify_init"),
    *("setxattr", "lsetxattr", "fsetxattr", "setxattrat"),
    *("removexattr", "lremovexattr", "fremovexattr", "removexattrat"),
)
# System call, number of the argument, comparison and its values: forbidden with these arguments. Some are 32 bits wide.
FORBIDDEN_ARGUMENTS = (
    *((name, 0, NOT_EQUAL, 0, 0) for name in ("sched_setaffinity", "prlimit64")),
    ("clone", 0, MASKED_EQUAL, 0x10000, 0),  # without CLONE_THREAD
    ("prctl", 0, MASKED_EQUAL, 0xFFFFFFFF, SET_DEATH_SIGNAL),  # the process would outlive the host
    ("socketpair", 1, MASKED_EQUAL, 2, 2),  # datagrams, which can be sent to any address
    # F_SETOWN, F_SETSIG, F_SETOWN_EX and the ioctls: the kernel would send any signal to any process of the user.
    *(("fcntl", 1, MASKED_EQUAL, 0xFFFFFFFF, command) for command in (8, 10, 15)),
    *(("ioctl", 1, MASKED_EQUAL, 0xFFFFFFFF, command) for command in (0x8901, 0x8902)),
    # F_SETLEASE, F_NOTIFY, F_SETPIPE_SZ: the user has 64 MiB of pipes, all programs together.
    *(("fcntl", 1, MASKED_EQUAL, 0xFFFFFFFF, command) for command in (1024, 1026, 1031)),
)

CAPABILITY_VERSION = 0x20080522
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446  # numbers of system calls
LANDLOCK_REFER = 1 << 13
CLONE_NEWNS = 0x20000
NOSUID_NODEV_NOEXEC = 14  # mount flags
WITHOUT_NAMESPACES = (
    "The code can read and change all that you can.",
    "Its files, folders and threads are not limited.",
    "It sees the other programs and their connections.",
)


def confine(limits: dict[str, int], *, isolated: bool, user: int | None) -> list[str]:
    """Confine this process irreversibly to what calculations need in its working folder.

    Args:
        limits: the numbers of `Limits`.
        isolated: whether this is in bubblewrap's namespaces.
        user: user and group to become, from root.

    Returns:
        The protections that are not in force, one sentence each; empty if `isolated`.

    Raises:
        OSError: `isolated`, and a protection is not in force.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if isolated:
        _mount_folder(libc, limits, user)
        _set_limit(resource.RLIMIT_NPROC, limits["threads"])
    _set_limit(resource.RLIMIT_AS, limits["memory_bytes"])
    _set_limit(resource.RLIMIT_FSIZE, limits["file_bytes"])
    _set_limit(resource.RLIMIT_NOFILE, limits["open_files"])
    _set_limit(resource.RLIMIT_CORE, 1)  # 0 would start a program of the system that takes the dump
    try:
        if sys.platform != "linux":
            raise OSError("it needs Linux")
        _call(libc.prctl, SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        _call(libc.prctl, SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        _call(libc.capset, struct.pack("Ii", CAPABILITY_VERSION, 0), bytes(24))
        missing = [] if isolated else [*WITHOUT_NAMESPACES, *_close_other_processes(libc)]
        _filter_syscalls()
    except OSError as error:
        if isolated:
            raise
        return [*WITHOUT_NAMESPACES, f"It can use the network and start programs: seccomp is not available ({error})."]
    return missing


def _set_limit(limit: int, value: int) -> None:
    """Set a resource limit, but never raise it above the current hard limit."""
    _, current = resource.getrlimit(limit)
    value = value if current == resource.RLIM_INFINITY else min(value, current)
    resource.setrlimit(limit, (value, value))


def _call(function: "ctypes._NamedFuncPointer", *arguments: int | bytes) -> None:
    if function(*(ctypes.c_ulong(x) if isinstance(x, int) else x for x in arguments)):
        code = ctypes.get_errno()
        raise OSError(code, f"{function.__name__}: {os.strerror(code)}")


def _close_other_processes(libc: ctypes.CDLL) -> list[str]:
    """Forbid /proc/PID/mem and the like with Landlock, whose processes cannot look into those outside."""
    # The only rule allows to move files between all folders, which would be forbidden otherwise.
    ruleset = libc.syscall(LANDLOCK_CREATE_RULESET, struct.pack("Q", LANDLOCK_REFER), 8, 0)
    root = os.open("/", os.O_PATH)
    rule = struct.pack("=Qi", LANDLOCK_REFER, root)
    if libc.syscall(LANDLOCK_ADD_RULE, ruleset, 1, rule, 0) or libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0):
        return ["It can read and change the memory of your other programs: Landlock is not available."]
    os.close(ruleset)
    os.close(root)
    return []


def _mount_folder(libc: ctypes.CDLL, limits: dict[str, int], user: int | None) -> None:
    """Mount a file system in memory with limits over the working folder, and become `user`."""
    owner = "" if user is None else f",uid={user},gid={user}"
    options = f"size={limits['folder_bytes']},nr_inodes={limits['folder_files'] + 1},mode=700{owner}"
    folder = os.getcwd()
    _call(libc.unshare, CLONE_NEWNS)
    _call(libc.mount, b"sandbox", os.fsencode(folder), b"tmpfs", NOSUID_NODEV_NOEXEC, options.encode())
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        _call(libc.prctl, SET_DUMPABLE, 1, 0, 0, 0)  # its own folder in /proc is root's otherwise
    os.chdir(folder)


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
        action = ctypes.c_uint32(RETURN_ERRNO | code)
        if failed := library.seccomp_rule_add_array(context, action, number, len(comparisons or ()), comparisons):
            raise OSError(-failed, f"cannot add a rule for {name}")

    try:
        for name in FORBIDDEN_SYSCALLS:
            return_errno(errno.EPERM, name)
        return_errno(0, "flock")  # nothing else to share a file with: reports success, but locks out nobody outside
        for name, *condition in FORBIDDEN_ARGUMENTS:
            return_errno(errno.EPERM, name, *condition)
        for name in ("kill", "tgkill", "rt_tgsigqueueinfo"):
            return_errno(errno.EPERM, name, 0, NOT_EQUAL, os.getpid(), 0)
        return_errno(errno.ENOSYS, "clone3")  # filters cannot see its flags; libc then falls back to clone
        if failed := library.seccomp_load(context):
            raise OSError(-failed, os.strerror(-failed))
    finally:
        library.seccomp_release(context)

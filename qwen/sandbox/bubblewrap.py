"""The command line of bubblewrap (https://github.com/containers/bubblewrap), which isolates the process.

Its file system holds Python, the installed libraries and a few files of the system, read-only, and nothing of the user.
"""

import os
import secrets
import sys
from pathlib import Path

# What Python programs read. `/proc` has only the processes in the sandbox.
READABLE_PATHS = (
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share", "/usr/local/share", "/nix/store"),
    *("/etc/alternatives", "/etc/fonts", "/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types", "/etc/nsswitch.conf"),
    *("/etc/timezone", "/sys/devices/system/cpu"),
)
FREE_USERS = range(61184, 65520)  # for services without an account of their own: https://systemd.io/UIDS-GIDS
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")  # --dev also makes a /dev/shm without limit


def choose_user() -> int | None:
    """Return the number of a user and group without an account, if this is root and can become them."""
    if os.getuid() == 0:
        for line in Path("/proc/self/uid_map").read_text().splitlines():
            first, _, count = map(int, line.split())
            if first <= FREE_USERS.start and FREE_USERS.stop <= first + count:
                return secrets.choice(FREE_USERS)
    return None


def bubblewrap_command(program: str, folder: Path, files: tuple[Path, ...], user: int | None) -> list[str]:
    """Build the command line of bubblewrap, without the command to run.

    Args:
        program: path of bwrap.
        folder: the working folder; empty until the command mounts a file system there.
        files: further readable files.
        user: what the command becomes, instead of root in a user namespace, whose threads are not counted.
    """
    interpreter = os.path.realpath(sys.executable)
    readable = [*READABLE_PATHS, *map(str, files), interpreter, os.path.join(sys.prefix, "pyvenv.cfg")]
    for prefix in {sys.prefix, sys.base_prefix, os.path.dirname(os.path.dirname(interpreter))}:
        readable += (os.path.join(prefix, name) for name in ("lib", "lib64", "share"))  # not files of the user beside
    command = [program, "--die-with-parent", "--new-session", "--unshare-ipc", "--unshare-net", "--unshare-pid"]
    command += ["--unshare-uts", "--hostname", "sandbox", "--unshare-cgroup-try"]
    command += ["--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]
    if user is not None:
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        # Alone in its process namespace: it could change the memory of a process 1 of the same user.
        command += ["--unshare-user", "--disable-userns", "--as-pid-1"]
    for path in (*readable, *DEVICES):
        if os.path.exists(path):  # --dir, because the parents of some would be closed to the other user
            command += ["--dir", os.path.dirname(path), "--dev-bind" if path in DEVICES else "--ro-bind", path, path]
    if interpreter != sys.executable:  # a virtual environment is found beside the name that Python is called by
        command += ["--symlink", interpreter, sys.executable]
    return [*command, "--proc", "/proc", "--dir", str(folder), "--chdir", str(folder), "--remount-ro", "/", "--"]

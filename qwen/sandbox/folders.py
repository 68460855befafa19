"""Copies files between the user's folder and the sandbox's, where code can only make plain files and folders."""

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MAX_DEPTH = 32  # deeper folders are not copied: code can nest them until no program can open their paths

Snapshot = dict[Path, tuple[int, int, int, int]]  # of each file, what changes with its content


def take_snapshot(root: Path) -> Snapshot:
    """Find the plain files below a folder."""
    files = {}
    for folder, folders, names in os.walk(root):
        relative = Path(folder).relative_to(root)
        if len(relative.parts) >= MAX_DEPTH:
            folders.clear()
        for name in names:
            with suppress(OSError):
                info = os.lstat(os.path.join(folder, name))
                if stat.S_ISREG(info.st_mode):
                    files[relative / name] = info.st_size, info.st_ino, info.st_mtime_ns, info.st_ctime_ns
    return files


def copy_changes(source: Path, target: Path, before: Snapshot, max_bytes: int) -> Iterator[str]:
    """Copy the files that have changed since `before`, and remove those of `before` that are gone.

    Args:
        max_bytes: maximum size of all files; sparse ones count in full.

    Yields:
        The reason for each file that is not copied.
    """
    files, size = take_snapshot(source), 0
    for path, state in files.items():
        size += state[0]
        if before.get(path) == state:
            continue
        try:
            if size > max_bytes:
                raise OSError(0, f"more than {max_bytes >> 20} MiB")
            _replace(source / path, target, path)
        except OSError as error:
            yield error.strerror or str(error)
    for path in before.keys() - files.keys():
        with suppress(OSError):
            (target / path).unlink()
            for parent in path.parents[:-1]:
                (target / parent).rmdir()  # until one is not empty


def _replace(source: Path, target: Path, path: Path) -> None:
    """Copy a file at once: links are replaced, not written through, and an old file stays if the copy fails."""
    parents = [target / parent for parent in reversed(path.parents[:-1])]
    for parent in parents:
        parent.mkdir(exist_ok=not parent.is_symlink())
    copy = (target / path).with_name(".sandbox-copy")
    copy.unlink(missing_ok=True)
    try:
        shutil.copyfile(source, copy)
        copy.replace(target / path)
    finally:
        copy.unlink(missing_ok=True)
    if os.getuid() == 0:  # root's files belong to whom the folder belongs to
        for new in (*parents, target / path):
            os.chown(new, target.stat().st_uid, target.stat().st_gid)

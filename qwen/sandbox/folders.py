"""Copies files between the user's folder and the sandbox's, where code can only make plain files and folders."""

import errno
import os
import secrets
import shutil
import stat
from contextlib import suppress
from pathlib import Path

MAX_DEPTH = 32  # deeper folders are not copied: code can nest them until no program can open their paths

State = tuple[int, int, int, int]  # of a file, what changes with its content
Snapshot = dict[Path, State]


def copy_changes(source: Path, target: Path, before: Snapshot, copies: Snapshot, max_bytes: int) -> list[str]:
    """Copy the files that have changed since `before`, and remove the copies of those that are gone.

    Args:
        before: the files of `source` when they were last copied; is updated.
        copies: those of `target` when they were last the same as in `source`; is updated.
        max_bytes: maximum size of all files; sparse ones count in full.

    Returns:
        The reason for each file that is not copied.
    """
    files, errors, size = _find_files(source), [], 0
    for path, state in files.items():
        size += state[0]
        if before.get(path) == state:
            continue
        try:
            if size > max_bytes:
                raise OSError(0, f"more than {max_bytes >> 20} MiB")
            copies[path] = _replace(source / path, target, path)
        except OSError as error:
            errors.append(error.strerror or str(error))
    for path in before.keys() - files.keys():
        with suppress(OSError):
            if copies.pop(path, None) == _state(target / path):  # else it is another file, maybe behind a link
                (target / path).unlink()
                for parent in path.parents[:-1]:
                    (target / parent).rmdir()  # until one is not empty
    before.clear()
    before.update(files)
    return errors


def _state(path: Path) -> State:
    """Return the state of a plain file.

    Raises:
        OSError: there is none, or something else.
    """
    info = path.lstat()
    if not stat.S_ISREG(info.st_mode):
        raise OSError(errno.EINVAL, "not a plain file")
    return info.st_size, info.st_ino, info.st_mtime_ns, info.st_ctime_ns


def _find_files(root: Path) -> Snapshot:
    files = {}
    for folder, folders, names in os.walk(root):
        relative = Path(folder).relative_to(root)
        if len(relative.parts) >= MAX_DEPTH:
            folders.clear()
        for name in names:
            with suppress(OSError):
                files[relative / name] = _state(Path(folder, name))
    return files


def _replace(source: Path, target: Path, path: Path) -> State:
    """Copy a file at once: links are replaced, not written through, and an old file stays if the copy fails."""
    owner = target.stat() if os.getuid() == 0 else None  # root's files belong to whom the folder belongs to
    for parent in reversed(path.parents[:-1]):
        if (folder := target / parent).is_symlink() or not folder.is_dir():
            folder.mkdir()
            if owner:
                os.chown(folder, owner.st_uid, owner.st_gid)
    copy = (target / path).with_name(f".sandbox-{secrets.token_hex(8)}")  # a name that no code can take
    try:
        shutil.copyfile(source, copy, follow_symlinks=False)
        if owner:
            os.chown(copy, owner.st_uid, owner.st_gid, follow_symlinks=False)
        if (target / path).is_file() and not (target / path).is_symlink():
            copy.chmod((target / path).stat().st_mode & 0o777)  # a private file stays private
        copy.replace(target / path)
    finally:
        copy.unlink(missing_ok=True)
    return _state(target / path)

"""Files and folders on disk that are whole or absent, whenever the process dies.

A file is written beside its target, flushed to the disk and renamed. A folder is filled beside
its target, its ``MANIFEST.json`` (name, bytes and SHA-256 of every file) is written last, and
then the folder is renamed. A reader who checks the manifest never uses half a write.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from turbo_lab.errors import BadInput, StoreError

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "MANIFEST.json"
FORMAT = 1
_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than allowed there",
    errno.EROFS: "the file system is read-only",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "there is no permission"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a file is in the place of a folder"),
}
_DISK_ONLY = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # cannot mean anything but the disk
_OURS = re.compile(r"\.(tmp|old)-([0-9a-f]{8})-(\d+)-[0-9a-f]{12}~(.+)")
_ABANDONED = 30 * 24 * 3600.0  # seconds after which the leftovers of another machine may go


class Damaged(StoreError):
    """A folder on disk is not what its manifest says, or has no manifest."""


# Files


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a name beside a file to write to; on a clean exit that is the file, on the disk.

    Raises:
        StoreError: the folder cannot be written in; the old content is untouched.
    """
    temp = _beside(path, "tmp")
    with explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        try:
            yield temp
            with temp.open("rb+") as file:  # only Windows needs a writable file to flush it
                os.fsync(file.fileno())
            os.replace(temp, path)
            _sync_folder(path.parent)
        finally:
            temp.unlink(missing_ok=True)


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write a file by `atomic_file`: readers see the old or the new content, never a part."""
    with atomic_file(path) as temp:
        temp.write_bytes(data)


def atomic_write_text(path: Path, text: str) -> None:
    """Write UTF-8 text like ``atomic_write_bytes``; line ends are kept as they are."""
    atomic_write_bytes(path, text.encode("utf-8"))


def save_tensors(
    folder: Path,
    file: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write tensors as one safetensors file inside a folder (usually of ``atomic_folder``).

    Tensors may be on any device, views, or tied (a tied tensor is written twice). Values that
    are not finite are kept.

    Raises:
        BadInput: a value is not a tensor.
        StoreError: the folder cannot be written in.
    """
    from safetensors.torch import save_file

    path = folder / file
    with explained(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(_plain(tensors), path, dict(metadata) if metadata else None)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    return path


def load_tensors(folder: Path, file: str) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        Damaged: the file is missing or no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / file)
    except FileNotFoundError:
        raise Damaged(f"{folder / file} is missing.") from None
    except SafetensorError as error:
        raise Damaged(f"{folder / file} is no valid safetensors file ({error}).") from error


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU, contiguous, one storage each: the form safetensors accepts."""
    import torch

    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise BadInput(name, type(tensor).__name__, "use a torch tensor")
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        plain[name] = value.clone() if storage in seen else value
        seen.add(storage)
    return plain


# Folders


@contextmanager
def atomic_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Give a temporary folder to fill; on a clean exit it becomes ``target``, whole.

    On an exception, and on a full disk, the temporary folder is removed and ``target`` is as
    before. If another process published a valid ``target`` meanwhile, that one stays and this
    work is dropped, unless ``replace`` asks to put this one in its place.

    Raises:
        StoreError: the place cannot be written in, or the folder holds a link.
    """
    temp = _beside(target, "tmp")
    with explained(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent)
        temp.mkdir()
    try:
        try:
            yield temp
        except Exception as error:
            if _is_about(error, temp):
                raise _sentence(error, target.parent) from error
            raise
        with explained(target.parent):
            _write_manifest(temp)
            _publish(temp, target, replace)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def read_folder(path: Path) -> dict[str, Path]:
    """Check every listed file of a folder and return them by name (posix, relative).

    Files that the manifest does not list are ignored and not returned.

    Raises:
        Damaged: no or bad manifest, a missing file, another size, another SHA-256.
        StoreError: a file is there and cannot be read.
    """
    files: dict[str, Path] = {}
    for name, (size, digest) in read_manifest(path).items():
        file = path / name
        try:
            with file.open("rb") as opened:
                found = os.fstat(opened.fileno()).st_size
                if found != size:
                    raise Damaged(f"{file} is damaged: it has {found} bytes instead of {size}.")
                if hashlib.file_digest(opened, "sha256").hexdigest() != digest:
                    raise Damaged(f"{file} is damaged: its SHA-256 is not that of the manifest.")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise Damaged(f"{file} is missing.") from None
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(f"Cannot read {file} ({error.strerror}).") from error
        files[name] = file
    return files


def read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Return bytes and SHA-256 of every file a folder's manifest lists, unchecked.

    Raises:
        Damaged: there is no manifest, or it is not one of ours.
    """
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text("utf-8"))
        listed = {str(f["name"]): (int(f["bytes"]), str(f["sha256"])) for f in manifest["files"]}
        version = manifest["format"]
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"{file} is missing.") from None
    except OSError as error:
        raise StoreError(f"Cannot read {file} ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{file} is damaged: it is not a manifest.") from error
    if version != FORMAT:
        raise Damaged(f"{file} has format {version!r}; this version reads format {FORMAT}.")
    for name in listed:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise Damaged(f"{file} is damaged: it lists {name!r}, outside its own folder.")
    return listed


def quarantine(path: Path, root: Path) -> Path:
    """Move a damaged folder to ``root/quarantine`` and return its new place.

    Raises:
        StoreError: it cannot be moved.
    """
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    place = root / "quarantine" / f"{path.name}-{stamp}-{uuid.uuid4().hex[:8]}"
    with explained(root):
        place.parent.mkdir(parents=True, exist_ok=True)
        os.rename(path, place)
    return place


def discard(path: Path) -> None:
    """Remove a folder: first out of sight by one rename, so no one meets a half of it."""
    if path.is_dir():
        with explained(path.parent):
            old = _beside(path, "tmp")
            os.rename(path, old)
            shutil.rmtree(old, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Clear what dead processes left in a folder; bring back a target they were replacing."""
    with suppress(OSError):
        for entry in list(folder.iterdir()):
            if not (match := _OURS.fullmatch(entry.name)) or _alive(entry, match[2], int(match[3])):
                continue
            target = folder / match[4]
            with suppress(OSError):
                if match[1] == "old" and not target.exists() and _whole(entry):
                    os.rename(entry, target)
                elif entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink()


def _write_manifest(folder: Path) -> None:
    """Flush and hash every file below a folder, then write the manifest beside them."""
    files: list[dict[str, Any]] = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise StoreError(f"{path.name} in {folder.parent} is not a plain file or folder.")
        if path.is_dir():
            _sync_folder(path)
        elif path != folder / MANIFEST:
            size, digest = _sync_and_hash(path)
            name = path.relative_to(folder).as_posix()
            files.append({"name": name, "bytes": size, "sha256": digest})
    text = json.dumps({"format": FORMAT, "files": files}, indent=1)
    atomic_write_text(folder / MANIFEST, text + "\n")


def _publish(temp: Path, target: Path, replace: bool) -> None:
    """Rename a finished folder to its target; the old one is only out of sight for a moment."""
    if not replace and _whole(target):
        return  # another process was first, and what it made is valid
    old = _beside(target, "old")
    with suppress(FileNotFoundError):
        os.rename(target, old)  # killed here: sweep brings it back
    try:
        os.rename(temp, target)
    except OSError:
        if replace or not _whole(target):  # else another process came between
            with suppress(OSError):
                os.rename(old, target)
            raise
    _sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _whole(path: Path) -> bool:
    try:
        read_folder(path)
    except StoreError:
        return False
    return True


def _sync_and_hash(path: Path) -> tuple[int, str]:
    # Only Windows needs a writable file to flush it.
    with path.open("rb+") if os.name == "nt" else path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size, digest


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there, and renames are journalled
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


# Names of temporary entries, and who made them


def _beside(target: Path, kind: str) -> Path:
    name = f".{kind}-{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:12]}~{target.name}"
    return target.with_name(name)


@cache
def _machine() -> str:
    """8 hex digits for the set of process ids we share: host, and container where there is one."""
    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]


def _alive(entry: Path, machine: str, pid: int) -> bool:
    if machine != _machine() or os.name == "nt":  # kill(pid, 0) is no harmless question on nt
        return time.time() - entry.lstat().st_mtime < _ABANDONED
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


# Sentences


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn a failed read or write in a folder into a StoreError of one sentence."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        if _number(error) is None:
            raise
        raise _sentence(error, folder) from error


def _sentence(error: Exception, folder: Path) -> StoreError:
    number = _number(error)
    default = (os.strerror(number) if number else str(error)).lower()
    return StoreError(f"Cannot write in {folder}: {_REASONS.get(number or 0, default)}.")


def _number(error: Exception) -> int | None:
    """The errno of a Python error, or of one that safetensors passes on from Rust as text."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    ours = type(error).__name__ == "SafetensorError"
    match = re.search(r"os error (\d+)", str(error)) if ours else None
    return int(match[1]) if match else None


def _is_about(error: Exception, folder: Path) -> bool:
    """Whether an error raised while a folder was being filled is about the disk under it.

    A hub that cannot be reached is an OSError too, and must keep its own words.
    """
    if isinstance(error, StoreError):
        return False
    if _number(error) in _DISK_ONLY:
        return True
    name = getattr(error, "filename", None)
    return isinstance(name, str | os.PathLike) and folder in Path(name).parents

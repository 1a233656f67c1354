"""Files that outlive a crash: each is written whole or not at all, and a folder has one writer at a time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from restoration.errors import UnwritableError, UserError, reason

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
PARTIAL_SUFFIX = ".partial"
_UNFINISHED = re.compile(r"\.[0-9a-f]{16}\.partial")  # of write_whole


def check_replaceable(path: Path, *, replace: bool) -> None:
    """UserError where `write_whole` would find a folder, or a file that shall not be replaced."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder, cannot be overwritten")
    if not replace and os.path.lexists(path):
        raise _exists_already(path)


def _exists_already(path: Path) -> UserError:
    return UserError(f"{path}: exists already (--force overwrites)")


def write_whole(path: Path, content: bytes | bytearray | memoryview, *, replace: bool = True) -> None:
    """Gives path this content: whenever process or machine stops, path is the old file or the new one, never a part.

    UnwritableError where it cannot be written, on a full disk, say; UserError where a file is there that shall not be
    replaced: that stays as it was, and nothing else is left.
    """
    # Short, as path's own name may be as long as can be.
    temporary = path.with_name(f".{secrets.token_hex(8)}{PARTIAL_SUFFIX}")
    try:
        with open(temporary, "xb") as file:
            write_through(file, content)
        _publish(temporary, path, replace)
    except FileExistsError:
        raise _exists_already(path) from None
    except OSError as error:
        raise UnwritableError(
            f"{path}: cannot be written ({reason(error)}); what was there before is untouched"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    _flush_folder(path.parent)


def _publish(temporary: Path, path: Path, replace: bool) -> None:
    """Gives the finished file its name; else FileExistsError, even where another appears this very moment."""
    if not replace:
        try:
            os.link(temporary, path)
            return
        except FileExistsError:
            raise
        # File systems without hard links (exFAT, some network shares): take the name first, empty for an instant.
        except OSError:
            open(path, "xb").close()
    os.replace(temporary, path)


def write_text_whole(path: Path, text: str, *, replace: bool = True) -> None:
    """`write_whole` of text in UTF-8. A file's name in it that is not in UTF-8 is written as it is."""
    write_whole(path, text.encode(errors="surrogateescape"), replace=replace)


def write_json(path: Path, value: object, *, replace: bool = True) -> None:
    """`write_text_whole` of a value as JSON."""
    write_text_whole(path, json.dumps(value, indent=2) + "\n", replace=replace)


def read_json(path: Path) -> dict:
    """The object that a file holds; empty where it holds none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_through(file: BinaryIO, content: bytes | bytearray | memoryview) -> None:
    """Writes, and waits until the disk has it: OSError where that has no room."""
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def make_folder(folder: Path) -> None:
    """Makes a folder where it is missing, and those that it lies in. UserError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror})") from error


def content_hash(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits; empty where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def size_in_bytes(path: Path) -> int:
    """Of a file; -1 where it is not there, or not to be looked at."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def lies_within(path: Path, folder: Path) -> bool:
    """Whether path, which may be missing, is the folder or lies somewhere in it."""
    return path.resolve().is_relative_to(folder.resolve())


def check_can_be_written(folder: Path) -> None:
    """UserError where a folder, or what it would have to be made in, takes no files. Makes nothing."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.exists(place))
    if not there.is_dir():
        raise UserError(f"{folder}: cannot be written to ({there} is no folder)")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot be written to ({there} takes no files)")


def _flush_folder(folder: Path) -> None:
    """Sends the folder's list of names to the disk: until then a power cut may take a renamed file back."""
    # Some network shares refuse to flush a folder, and keep names safe in their own way.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Makes the folder and holds it: UserError where another process does, or where it cannot be written to.

    What a writer that was killed left half written is removed. The hold ends with the process, however that ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK_FILE, "wb")  # noqa: SIM115 (held by the with statement below)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror})") from error
    with lock:
        if _locked(lock.fileno(), folder):
            for left in folder.glob(f".*{PARTIAL_SUFFIX}"):
                if _UNFINISHED.fullmatch(left.name):
                    left.unlink(missing_ok=True)
        yield


def _locked(descriptor: int, folder: Path) -> bool:
    """Whether the lock was taken; False where the file system has none."""
    try:
        # POSIX's record lock: unlike flock's, forked loader processes, which live some seconds longer, do not share it.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{folder}: another process is writing there") from None
    except OSError as error:
        logger.warning("%s: cannot be locked against a second writer (%s)", folder, error.strerror)
        return False
    return True

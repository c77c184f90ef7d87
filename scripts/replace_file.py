"""Writing a file anew: the old one or the new one is there at any moment, and never half of one."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def replace_file(path: Path, pieces: Iterable[bytes]) -> None:
    """Put a new file in the place of ``path``, with the owner and the mode of the old one if there is one.

    Args:
        path: where a link stands here, it is replaced, not followed.
        pieces: the content.

    Raises:
        OSError: it cannot be written, or cannot be given to the owner of the old one. What is there stays as it is.
    """
    with replacing(path) as file:
        file.writelines(pieces)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of ``path`` when the block ends, and is gone if it fails.

    Raises:
        OSError: as :func:`replace_file`.
    """
    old = path.stat() if path.exists() else None
    # A name that nobody can have foreseen, and that is refused if it is there all the same, be it as a link.
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666 if old is None else 0o600)
    try:
        with open(descriptor, "wb") as file:
            if old is not None:
                new = os.fstat(descriptor)
                if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
                    os.fchown(descriptor, old.st_uid, old.st_gid)
                os.fchmod(descriptor, stat.S_IMODE(old.st_mode))
            yield file
            file.flush()
            os.fsync(descriptor)
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise

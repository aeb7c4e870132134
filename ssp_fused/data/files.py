"""Where data files are looked for, and their checksums."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

ENVIRONMENT = "SSP_FUSED_DATA"
_CHUNK = 1 << 20


def search_folders(name: str, data_dir: Path | None, package: Path | None = None) -> list[Path]:
    """The folders that may hold a data set's files; downloads go to the first.

    A folder that was asked for, by argument or environment, is the only place looked at: data
    from elsewhere would not be what the caller meant. In each place a folder named like the data
    set comes first, since MNIST and Fashion-MNIST have files of the same names.

    Args:
        name: name of the data set.
        data_dir: the folder asked for; if None, SSP_FUSED_DATA, then the cache folder
            (ssp_fused in $XDG_CACHE_HOME, by default in ~/.cache).
        package: where the system's package of the data puts it.
    """
    asked = data_dir or os.environ.get(ENVIRONMENT)
    if asked:
        return [Path(asked) / name, Path(asked)]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssp_fused"
    return [cache / name, cache, *([package] if package else [])]


def missing(what: str, name: str, folders: Sequence[Path], hint: str = "") -> FileNotFoundError:
    """The error for a data set that is in none of the folders looked at."""
    looked = ", ".join(map(str, folders))
    return FileNotFoundError(
        f"no {what} of {name} in {looked}; download it with --download, or give the folder that "
        f"holds it with --data-dir{hint}"
    )


def file_sha256(file: BinaryIO) -> str:
    """SHA-256 of an open file from its beginning, in hex; the file is left at its beginning."""
    file.seek(0)
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    file.seek(0)
    return digest.hexdigest()


def check_digest(where: str | Path, found: str, expected: str, kind: str = "SHA-256") -> None:
    """Raise ValueError naming the file, what was found and what was expected if they differ."""
    if found != expected:
        raise ValueError(f"{where}: {kind} is {found}, expected {expected}")

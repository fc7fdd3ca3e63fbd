"""The master key: 256 random bits in a 0600 file of their own, or in the environment; never in settings or a backup."""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from appliance.errors import KeyFileError

ENVIRONMENT = "APPLIANCE_MASTER_KEY"
_HEX = re.compile(r"[0-9a-fA-F]{64}")


class MasterKey:
    """32 bytes that show themselves nowhere."""

    __slots__ = ("_hex",)

    def __init__(self, hexadecimal: str, origin: str) -> None:
        if not _HEX.fullmatch(hexadecimal):
            raise KeyFileError(f"{origin} does not hold a master key: 64 hexadecimal digits are expected.")
        self._hex = hexadecimal.lower()

    @classmethod
    def generate(cls) -> MasterKey:
        return cls(secrets.token_hex(32), "the generator")

    def __repr__(self) -> str:
        return "MasterKey(********)"

    def __reduce__(self) -> str:
        raise TypeError("a master key is not serialised")

    @property
    def pragma(self) -> str:
        """The value of SQLCipher's `key` pragma for a raw key (no key derivation)."""
        return f"\"x'{self._hex}'\""

    @property
    def hexadecimal(self) -> str:
        """For the key file only."""
        return self._hex


def create_key_file(path: Path) -> MasterKey:
    """A new key in a new file, durable before it returns. Raises KeyFileError if it exists or cannot be written."""
    key = MasterKey.generate()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(key.hexadecimal + "\n")
            file.flush()
            os.fsync(file.fileno())
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
    except OSError as error:
        raise KeyFileError(f"The key file {path} cannot be made: {error.strerror}.") from error
    return key


def read_key(path: Path, environ: Mapping[str, str] = os.environ) -> MasterKey:
    """The key of the environment, else of the file. Raises KeyFileError."""
    if value := environ.get(ENVIRONMENT):
        return MasterKey(value.strip(), f"The environment variable {ENVIRONMENT}")
    try:
        with path.open() as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read(200)
    except FileNotFoundError as error:
        raise KeyFileError(
            f"The key file {path} is missing. Put the saved copy back: without it the database cannot be opened."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"The key file {path} cannot be read.") from error
    if mode & 0o077:
        raise KeyFileError(f"The key file {path} can be read by others (mode {mode:04o}): run chmod 600 {path}.")
    return MasterKey(text.strip(), f"The key file {path}")

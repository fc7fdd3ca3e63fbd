"""Secrets that settings name by file: read once, of mode 0600, one line of printable characters."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import NoReturn

from appliance.errors import ConfigError


def read(setting: str, file: str, shortest: int = 1) -> str:
    """The secret in `file`; empty without one. Raises ConfigError, naming the `setting`, for what is no secret."""
    if not file:
        return ""
    try:
        if stat.S_IMODE(os.stat(file).st_mode) & 0o077:
            raise ConfigError(f"{setting}: {file} can be read by others: run chmod 600 {file}.")
        secret = Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting}: {file} cannot be read.") from error
    return checked(f"{setting}: {file}", secret, shortest) or _refuse(f"{setting}: {file}", shortest)


def checked(where: str, secret: str, shortest: int = 1) -> str:
    """`secret` without white space around it; empty where there is none. Raises ConfigError for what is no secret."""
    secret = secret.strip()
    if secret and not re.fullmatch(rf"[!-~]{{{shortest},}}", secret):
        _refuse(where, shortest)
    return secret


def _refuse(where: str, shortest: int) -> NoReturn:
    what = f"a secret of {shortest} or more characters" if shortest > 1 else "a secret"
    raise ConfigError(f"{where} must hold {what}, on one line.")

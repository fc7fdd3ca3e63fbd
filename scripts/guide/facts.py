"""What the product's own tables say, for answers that must not drift from them, and a check of what answers claim.

Placeholders such as `{{plan.community.minute}}` are filled from the plans, settings and errors of the running code.
`unknown_claims` finds every command, option, setting, path and number in a text that none of these tables knows.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache

import click

from appliance import cli, config, errors
from appliance.access.plans import Plans
from appliance.api.endpoints import ENDPOINTS

PLACEHOLDER = re.compile(r"\{\{([^{}]+)\}\}")
_CODE = re.compile(r"`([^`]*)`")
_NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?![\w.]*\.\d)(?!\w)")
_SETTING = re.compile(r"\[(\w+)\] (\w+)")
_VARIABLE = re.compile(r"APPLIANCE_([A-Z]+)__([A-Z_]+)")
_PATH = re.compile(r"(?<![\w.~/])(?:/[\w.-]+)+")

_STATUS = {"BAD_REQUEST": 400}  # has several; this one says it best
WINDOWS = {"minute": "per_minute", "hour": "per_hour", "month": "per_month", "concurrent": "concurrent"}


def number(value: float | None) -> str:
    """As people write it: 1,000, 30, 1.5, unlimited."""
    if value is None:
        return "unlimited"
    return f"{int(value):,}" if float(value).is_integer() else f"{value:g}"


@cache
def placeholders() -> dict[str, str]:
    """Every placeholder's text."""
    found: dict[str, str] = {}
    for plan in Plans().values():
        found |= {f"plan.{plan.name}.{w}": number(getattr(plan, field)) for w, field in WINDOWS.items()}
    for setting in config.settings():
        plain = isinstance(setting.default, str | bool) or setting.name.endswith("port")
        found[f"setting.{setting.name}"] = str(setting.default) if plain else _shown(setting.default)
    for error in _subclasses(errors.ApplianceError):
        found[f"status.{error.code}"] = str(_STATUS.get(error.code, error.status))
        found[f"exit.{error.__name__}"] = str(error.exit_code)
    return found


def _shown(value: object) -> str:
    return (
        number(value)
        if isinstance(value, int | float)
        else str(list(value))
        if isinstance(value, tuple)
        else str(value)
    )


def _subclasses(root: type[errors.ApplianceError]) -> Iterator[type[errors.ApplianceError]]:
    for child in root.__subclasses__():
        yield child
        yield from _subclasses(child)


def render(text: str) -> str:
    """`text` with its placeholders filled. Raises KeyError for an unknown one."""
    return PLACEHOLDER.sub(lambda match: placeholders()[match[1]], text)


@cache
def commands() -> dict[str, click.Command]:
    """Every command by its words after `appliance`: `serve`, `key create` and so on; groups too."""
    found: dict[str, click.Command] = {}

    def walk(group: click.Group, words: tuple[str, ...]) -> None:
        for name, command in group.commands.items():
            found[" ".join((*words, name))] = command
            if isinstance(command, click.Group):
                walk(command, (*words, name))

    walk(cli.main, ())
    return found


def command_help(words: str) -> str:
    """The first sentence of a command's help."""
    return (commands()[words].help or "").strip().split("\n")[0].strip()


# Numbers in answers that stand in no table, and where they come from.
CONSTANTS = {
    "0": "an exit code, a status of nothing, a switched-off sampler",
    "1": "an exit code, least sizes, the first month's day",
    "2": "seconds beyond the drain limit; GB of disk; times",
    "3": "GB of disk; levels; a mark of time",
    "4": "examples of sizes",
    "5": "seconds of retry_after while stopping; starts of the service; minutes",
    "6": "an example", "8": "UTF-8; slots up to which one pool is kept; a whole number's default",
    "0.5": "GB that doctor adds for the process", "4.5": "GB of the 8b bench shape", "8.5": "GB of the 8b bench shape",
    "8B": "a model's size", "70B": "a model's size", "0600": "mode of secrets", "0700": "mode of directories",
    "15": "seconds that the service adds to the drain limit; pings", "16": "stop strings", "32": "characters of a key",
    "36": "characters of a key with its prefix", "40": "top_k", "0.7": "temperature", "0.95": "top_p", "0.05": "min_p",
    "0.0.0.0": "all addresses", "60": "seconds that are worth waiting", "64": "hexadecimal digits; JSON levels",
    "80": "percent of the month", "100": "longest names; lines of a log", "128": "most slots; exit code of a signal",
    "200": "a status", "256": "SHA-256, AES-256; the waiting line", "397": "days of a certificate", "405": "a status",
    "408": "a status", "413": "a status", "415": "a status", "431": "a status", "499": "a client that is gone",
    "500": "longest stop string", "512": "schema caps; MB", "1,000": "largest top_k", "1,024": "default answer",
    "1024": "the first port that needs no right", "3,600": "largest drain limit", "10,000": "most messages",
    "32,768": "largest default context", "65,536": "schema bytes", "1746619200": "the seed's example of a reset",
    "2.0": "Apache-2.0", "3.11": "Python", "3.21": "CMake", "8601": "ISO 8601", "00": "midnight",
}  # fmt: skip

# Words in backticks that are files, units or places of other programs.
_FOREIGN_PATHS = {
    "/dev", "/etc", "/home", "/opt", "/path", "/run", "/tmp", "/usr", "/var",
}  # fmt: skip


def unknown_claims(text: str, *, said: str = "") -> list[str]:
    """Commands, settings, variables, paths and numbers in `text` that no table knows; what `said` holds is allowed."""
    return [
        *_unknown_commands(text),
        *_unknown_settings(text),
        *_unknown_paths(text, said),
        *_unknown_numbers(text, said),
    ]


@cache
def _bounds() -> set[str]:
    """The ranges of all settings."""
    return {f"{bound:,}" for s in config.settings() for bound in (s.low, s.high) if bound is not None}


def _unknown_commands(text: str) -> Iterator[str]:
    for code in _CODE.findall(text):
        words = re.split(r"[|>]", code)
        for part in words:
            at = re.search(r"(?:^|\s|/)appliance ((?:[a-z][a-z-]*)(?: [a-z-]+)?)", part)
            if at and "systemctl" not in part and "journalctl" not in part and not _is_command(part[at.start(1) :]):
                yield f"appliance {at[1]}"


def _is_command(rest: str) -> bool:
    """Whether the words begin with a command, and every option is one of its."""
    try:
        words = shlex.split(rest)
    except ValueError:
        return False
    name = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in commands()), None)
    if name is None or (isinstance(commands()[name], click.Group) and words[len(name.split()) :]):
        return False  # a group wants one of its own commands
    known = {option for p in commands()[name].params for option in p.opts} | {"--help", "-h"}
    return all(word.split("=")[0] in known for word in words if word.startswith("--"))


def _unknown_settings(text: str) -> Iterator[str]:
    names = {setting.name for setting in config.settings()}
    for section, key in _SETTING.findall(text):
        if f"{section}.{key}" not in names:
            yield f"[{section}] {key}"
    for section, key in _VARIABLE.findall(text):
        if f"{section}.{key}".lower() not in names:
            yield f"APPLIANCE_{section}__{key}"


def _unknown_paths(text: str, said: str) -> Iterator[str]:
    known = {path for e in ENDPOINTS for path in (e.path, *e.aliases)} | {"/api", "/api/v1", "/v1"}
    for code in _CODE.findall(text):
        for path in _PATH.findall(re.sub(r"https?://[^/\s`]+", "", code)):
            first = "/" + path.split("/")[1]
            if path.rstrip(".") not in known and first not in _FOREIGN_PATHS and path not in said:
                yield path


def _unknown_numbers(text: str, said: str) -> Iterator[str]:
    known = set(placeholders().values()) | set(CONSTANTS) | _bounds()
    for found in _NUMBER.findall(_CODE.sub(" ", text)):
        if found.rstrip(",") not in known and found not in said:
            yield found

"""Settings: one frozen dataclass per section of `config.toml`. The classes below are THE table of settings;
loader, `config show`, the documentation and their test all read it.

Owns reading and checking; does not act on any setting. Secrets never live here (environment or 0600 files only).
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

from appliance.errors import ConfigError, DataDirError


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    parse: Callable[[str], object] | None = None,
    words: str = "",
) -> Any:
    """A field with its meaning and its allowed range (inclusive) beside it. `parse` raises ValueError for a text that
    the setting does not take; `words` then says what it takes."""
    metadata = {"help": help, "low": low, "high": high, "choices": choices, "parse": parse, "words": words}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _web_address(text: str) -> str:
    parts = urlsplit(text)
    plain = not (parts.username or parts.password or parts.query or parts.fragment)
    if text and not (parts.scheme in ("http", "https") and parts.hostname and plain):
        raise ValueError
    return text


def _host_name(text: str) -> str:
    if text != "*" and not re.fullmatch(r"\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]{1,253}", text):
        raise ValueError
    return text


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """`[server]`"""

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8080, "port to listen on; 0 picks a free one", low=0, high=65535)
    tls_cert: str = setting("", "PEM file of the certificate chain; with tls_key serves HTTPS")
    tls_key: str = setting("", "PEM file of the certificate's private key")
    public_url: str = setting(
        "",
        "the address people use; its host is accepted",
        parse=_web_address,
        words="an address such as https://llm.example.org",
    )
    allowed_hosts: tuple[str, ...] = setting(
        (),
        "further Host names to accept; '*' accepts all",
        parse=_host_name,
        words="a list of names or addresses, or '*'",
    )
    trusted_proxies: tuple[str, ...] = setting(
        (),
        "proxies whose X-Forwarded-For is believed",
        parse=ip_network,
        words="a list of addresses or networks, such as 10.0.0.0/8",
    )
    max_header_bytes: int = setting(65_536, "largest request head, bytes", low=1_024, high=1_048_576)
    max_body_bytes: int = setting(2_097_152, "largest JSON body, bytes", low=1_024, high=104_857_600)
    header_timeout_seconds: float = setting(10.0, "a request's head must arrive within", low=0.1, high=600)
    body_timeout_seconds: float = setting(30.0, "a request's body must arrive within", low=0.1, high=3600)
    write_timeout_seconds: float = setting(30.0, "a client that reads nothing this long is dropped", low=0.1, high=3600)
    keep_alive_seconds: float = setting(75.0, "an idle connection is closed after", low=1, high=3600)
    max_connections: int = setting(1_024, "open connections; one more is answered 503", low=1, high=65_536)
    drain_seconds: float = setting(30.0, "on SIGTERM running answers may go on for", low=0, high=3600)
    stream_header_hold_seconds: float = setting(
        1.5, "a stream's status waits this long for its first token, so that refusals are real statuses", low=0, high=60
    )
    ping_seconds: float = setting(15.0, "a silent stream gets a comment this often", low=0.05, high=15)
    metrics_token_file: str = setting(
        "", "file of the token with which other machines may read /metrics; empty: none may"
    )


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """`[engine]`"""

    model: str = setting("", "GGUF file, or a name in the models manifest; empty: the one `models use` chose")
    slots: int = setting(8, "sequences that generate at the same time", low=1, high=128)
    context: int = setting(
        0, "KV tokens in all, shared by the slots; 0: the model's own, at most 32,768", low=0, high=16_777_216
    )
    gpu_layers: int = setting(-1, "layers on the GPU; -1: all", low=-1, high=10_000)
    split_mode: str = setting("layer", "how several GPUs share the model", choices=("none", "layer", "row", "tensor"))
    tensor_split: tuple[float, ...] = setting((), "share of each GPU, e.g. [3, 1]", low=0, high=1_000_000)
    kv_type: str = setting(
        "f16", "type of the KV cache", choices=("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
    )
    kv_mode: str = setting(
        "auto", "one KV pool for all sequences, or one stream each", choices=("auto", "unified", "split")
    )
    batch: int = setting(2_048, "most tokens in one decode call", low=32, high=65_536)
    ubatch: int = setting(512, "tokens computed in one graph", low=16, high=65_536)
    threads: int = setting(0, "CPU threads of llama.cpp; 0: the physical cores", low=0, high=1_024)
    flash_attention: str = setting("auto", "flash attention", choices=("auto", "on", "off"))
    mlock: bool = setting(False, "lock the model in memory")
    prefill_budget: int = setting(
        0, "prompt tokens per step while others generate; 0: adapts to the latency goal", low=0, high=65_536
    )
    inter_token_ms: int = setting(200, "goal for the gap between two tokens while prompts are read", low=5, high=10_000)
    parked_mb: int = setting(
        512, "main memory for prompts that left the KV cache, MB; 0: they are computed again", low=0, high=16_777_216
    )
    queue_limit: int = setting(256, "requests that may wait", low=0, high=100_000)
    queue_seconds: float = setting(120.0, "a request waits at most", low=0.1, high=3_600)
    longest_run: int = setting(
        200_000, "longest stretch of text without white space, characters", low=1_000, high=10_000_000
    )


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """`[store]`"""

    key_file: str = setting("", "file of the master key; empty: secrets/master.key in the data directory")


@dataclass(frozen=True, slots=True)
class LimitSettings:
    """`[limits]`"""

    turn_seconds: float = setting(
        10.0, "a call waits this long at most until fewer of its account run", low=0, high=3_600
    )
    strangers_per_minute: int = setting(120, "calls without a valid key per address", low=1, high=1_000_000)
    wrong_keys_per_minute: int = setting(20, "calls with a wrong key per address", low=1, high=1_000_000)


@dataclass(frozen=True, slots=True)
class RetentionSettings:
    """`[retention]`"""

    ip_days: int = setting(30, "days after which addresses in the log of calls are shortened", low=0, high=36_500)
    call_days: int = setting(400, "days after which rows of the log of calls go", low=1, high=36_500)


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """`[plans.NAME]`: what an account of this plan may use; calls are counted in UTC windows."""

    per_minute: int = setting(20, "calls per minute", low=1, high=1_000_000_000)
    per_hour: int = setting(200, "calls per hour", low=1, high=1_000_000_000)
    per_month: int = setting(1_000, "calls per month; 0: unlimited", low=0, high=1_000_000_000_000)
    concurrent: int = setting(2, "calls at the same time", low=1, high=100_000)
    weight: float = setting(1.0, "share of a busy box", low=0.01, high=1_000)
    fallback_wait_seconds: float = setting(
        10.0, "a call that would wait longer goes to Groq, where that is allowed", low=0, high=3_600
    )


def _alias(text: str) -> str:
    left, equals, right = text.partition("=")
    if not (equals and left.strip() and right.strip()):
        raise ValueError
    return text


@dataclass(frozen=True, slots=True)
class ProviderSettings:
    """`[providers.NAME]`: a server elsewhere that speaks OpenAI's API."""

    base_url: str = setting(
        "", "address of its API, with /v1", parse=_web_address, words="an address such as https://llm.example.org/v1"
    )
    model: str = setting("", "the model that is asked there")
    key_file: str = setting("", "file of the key that it wants, of mode 0600; empty: none")
    aliases: tuple[str, ...] = setting(
        (), "names that requests may use for models there", parse=_alias, words='a list of texts such as "old=new"'
    )
    connect_seconds: float = setting(5.0, "a connection must be made within", low=0.1, high=600)
    first_seconds: float = setting(60.0, "its first word must come within", low=0.1, high=3_600)
    gap_seconds: float = setting(30.0, "the next word must come within", low=0.1, high=3_600)
    total_seconds: float = setting(600.0, "its answer must be whole within", low=1, high=86_400)


@dataclass(frozen=True, slots=True)
class GroqSettings(ProviderSettings):
    """`[groq]`: as `[providers.NAME]`, with Groq's values."""

    base_url: str = setting(
        "https://api.groq.com/openai/v1",
        "address of its API",
        parse=_web_address,
        words="an address such as https://llm.example.org/v1",
    )
    model: str = setting("openai/gpt-oss-120b", "the model that is asked there")
    key_file: str = setting("", "file of the key, of mode 0600; empty: the environment variable GROQ_API_KEY")
    aliases: tuple[str, ...] = setting(
        ("llama3-70b-8192=openai/gpt-oss-120b",),
        "names that requests may use for models there",
        parse=_alias,
        words='a list of texts such as "old=new"',
    )


PLANS = {
    "community": PlanSettings(),
    "professional": PlanSettings(60, 1_000, 10_000, 10, 2.0),
    "enterprise": PlanSettings(300, 10_000, 0, 50, 4.0),
}
FIRST_PLAN = "plans.community"
_GROUP_NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")
TAKEN = {"auto", "local", "groq"}  # names that no server elsewhere may have


@dataclass(frozen=True, slots=True)
class Config:
    """All settings, where they live, and where each value came from (`sources["server.port"]`)."""

    data_dir: Path
    server: ServerSettings = field(default_factory=ServerSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    store: StoreSettings = field(default_factory=StoreSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    retention: RetentionSettings = field(default_factory=RetentionSettings)
    groq: GroqSettings = field(default_factory=GroqSettings)
    plans: Mapping[str, PlanSettings] = field(default_factory=lambda: dict(PLANS))
    providers: Mapping[str, ProviderSettings] = field(default_factory=dict)
    file: Path | None = None
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def database(self) -> Path:
        return self.data_dir / "appliance.db"

    @property
    def key_file(self) -> Path:
        return Path(self.store.key_file) if self.store.key_file else self.data_dir / "secrets" / "master.key"

    @property
    def models_dir(self) -> Path:
        return self.data_dir / "models"


SECTIONS: dict[str, type[Any]] = {
    "server": ServerSettings,
    "engine": EngineSettings,
    "store": StoreSettings,
    "limits": LimitSettings,
    "retention": RetentionSettings,
    "groq": GroqSettings,
}
# Sections of which there may be several, [plans.NAME] and [providers.NAME]: their class, and which there always are.
GROUPS: dict[str, tuple[type[Any], Mapping[str, Any]]] = {
    "plans": (PlanSettings, PLANS),
    "providers": (ProviderSettings, {}),
}
# relative ones are relative to the settings file that names them
PATHS = {"server.tls_cert", "server.tls_key", "server.metrics_token_file", "store.key_file"}
PATH_KEYS = {"key_file"}  # of every section
PREFIX = "APPLIANCE_"
CHECKOUT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table: full name, type, default, meaning, range or choices."""

    name: str
    type: Any
    default: Any
    help: str
    low: float | None
    high: float | None
    choices: tuple[str, ...]
    parse: Callable[[str], object] | None
    words: str

    @property
    def allowed(self) -> str:
        """The allowed values in words."""
        if self.words:
            return self.words
        if self.choices:
            return "one of " + ", ".join(self.choices)
        kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        words = kinds.get(self.type) or "a list of " + {str: "texts", float: "numbers"}[get_args(self.type)[0]]
        return words if self.low is None else f"{words} from {self.low:,} to {self.high:,}"


def settings(config: Config | None = None) -> list[Setting]:
    """Every setting, in the order of the table; of plans and providers those of `config`."""
    found = [one for section, cls in SECTIONS.items() for one in _section(section, cls())]
    for group, (cls, known) in GROUPS.items():
        for name in known if config is None else getattr(config, group):
            found += _section(f"{group}.{name}", known.get(name, cls()))
    return found


def _section(section: str, defaults: Any) -> list[Setting]:
    hints = get_type_hints(type(defaults))
    return [
        Setting(f"{section}.{f.name}", hints[f.name], getattr(defaults, f.name), **f.metadata) for f in fields(defaults)
    ]


def default_data_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """$APPLIANCE_DATA_DIR, else /var/lib/appliance as root, else ~/.local/share/appliance."""
    if given := environ.get("APPLIANCE_DATA_DIR"):
        return Path(given)
    if os.geteuid() == 0:
        return Path("/var/lib/appliance")
    return Path(environ.get("HOME", "~")).expanduser() / ".local" / "share" / "appliance"


def load(
    data_dir: str | Path | None = None,
    config_file: str | Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Config:
    """The effective settings: defaults, then the first file of `config_file`, the data directory's and the checkout's,
    then the environment. Raises ConfigError with one line for whatever is wrong, DataDirError for a closed directory.
    """
    if data_dir == "":
        raise ConfigError("option --data-dir: the name of a directory is expected, not an empty text.")
    directory = Path(data_dir or default_data_dir(environ)).absolute()
    config = Config(directory)
    file = _settings_file(directory, config_file)
    if file is not None:
        config = replace(_override(config, _read_file(file), f"file {file}"), file=file)
    config = _read_environment(config, environ)
    for name, provider in config.providers.items():
        for key in ("base_url", "model"):
            if not getattr(provider, key):
                raise ConfigError(
                    f"providers.{name}.{key} must be set: a server elsewhere needs its address and a model."
                )
    return config


def _settings_file(directory: Path, given: str | Path | None) -> Path | None:
    if given is not None:
        if not os.path.isfile(given):
            raise ConfigError(f"option --config: there is no settings file {given}.")
        return Path(given).absolute()
    if directory.exists() and not os.access(directory, os.R_OK | os.X_OK):
        raise DataDirError(f"The data directory {directory} is closed to this user: run as its owner, or as root.")
    candidates = (directory / "config.toml", CHECKOUT / "config.toml")
    return next((file for file in candidates if os.path.lexists(file)), None)


def override(config: Config, values: Mapping[str, Any], source: str) -> Config:
    """`config` with values such as `{"server.port": 9000}`. Raises ConfigError, naming `source`."""
    return _override(config, values.items(), source)


def show(config: Config) -> list[tuple[str, str, str]]:
    """(name, value, source) of every setting."""
    rows = []
    for s in settings(config):
        section, name = s.name.rsplit(".", 1)
        value = getattr(_values(config, section), name)
        shown = list(value) if isinstance(value, tuple) else value
        rows.append((s.name, _toml(shown), config.sources.get(s.name, "default")))
    return rows


def example() -> str:
    """The commented `config.toml` of the checkout: every setting at its default."""
    lines = [
        "# Every setting at its default. Copy this file into the data directory, or name it with --config, and take",
        "# the mark off the lines you change. APPLIANCE_<SECTION>__<KEY> in the environment overrides a line.",
    ]
    section = ""
    for s in settings():
        if s.name.rpartition(".")[0] != section:
            section = s.name.rpartition(".")[0]
            note = ["# A section [plans.NAME] with another name adds a plan."] if section == FIRST_PLAN else []
            note += (
                ["# Further servers are sections [providers.NAME] with the same settings."] if section == "groq" else []
            )
            lines += ["", *note, f"[{section}]"]
        default = list(s.default) if isinstance(s.default, tuple) else s.default
        lines += [f"# {s.help}; {s.allowed}", f"# {s.name.rpartition('.')[2]} = {_toml(default)}"]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # TOML's basic strings know JSON's escapes, and want one more
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return str(value)


def _read_file(file: Path) -> Iterable[tuple[str, Any]]:
    """(full name, value) of every line of the file, unknown sections refused."""
    try:
        tables = tomllib.loads(file.read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: this is not valid TOML: {error}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: the settings file cannot be read.") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, lists in lists in lists
        raise ConfigError(f"{file}: this is not a settings file: a value is too long or too deep.") from error
    for group in GROUPS:
        members = tables.pop(group, {})
        if not isinstance(members, dict):
            raise ConfigError(f"{file}: {group} are sections: write [{group}.NAME] on a line of its own.")
        if group == "providers" and (taken := sorted(TAKEN & set(members))):
            raise ConfigError(f"{file}: no server elsewhere can have the name {taken[0]}; Groq's section is [groq].")
        tables |= {f"{group}.{name}": table for name, table in members.items()}
    for section, table in tables.items():
        if section not in SECTIONS and section.partition(".")[0] not in GROUPS:
            nearest = _nearest(section, [*SECTIONS, *GROUPS])
            raise ConfigError(f"{file}: there is no section [{_shown(section, bare=True)}]; {nearest}.")
        if not isinstance(table, dict):
            raise ConfigError(f"{file}: {section} is a section: write [{section}] on a line of its own.")
        group, _, member = section.partition(".")
        if group in GROUPS and not table:  # there is one all the same, with the values of every one
            cls, known = GROUPS[group]
            first = fields(cls)[0].name
            table = {first: getattr(known.get(member, cls()), first)}
        for name, value in table.items():
            yield f"{section}.{name}", _beside(file, f"{section}.{name}", value)


def _beside(file: Path, name: str, value: Any) -> Any:
    """`value`, as an absolute path where it is one: a relative path is relative to the settings file."""
    if not isinstance(value, str) or not value:
        return value
    path = os.path.normpath(file.parent / os.path.expanduser(value))
    is_model = name == "engine.model" and (os.sep in value or os.path.isfile(path))  # else a name in the manifest
    is_path = name in PATHS or name.rpartition(".")[2] in PATH_KEYS
    return path if is_path or is_model else value


def _read_environment(config: Config, environ: Mapping[str, str]) -> Config:
    """Variables with a double underscore after the section are settings; the others belong to somebody else."""
    known = {s.name: s for s in settings()}
    for variable, text in sorted(environ.items()):
        if not variable.startswith(PREFIX) or "__" not in variable:
            continue
        name = variable.removeprefix(PREFIX).lower().replace("__", ".", 1)
        if name.partition(".")[0] in GROUPS:
            name = name.replace("__", ".")
            known |= _of_group(name)
        if name not in known:
            nearest = _nearest(name, known, lambda n: PREFIX + n.upper().replace(".", "__"))
            raise ConfigError(f"environment {_shown(variable, bare=True)}: there is no such setting; {nearest}.")
        config = override(config, {name: _from_text(known[name], text)}, f"environment {variable}")
    return config


def _from_text(s: Setting, text: str) -> Any:
    """The value that `text` means for a setting of this type; nonsense stays text and is refused later."""
    if s.type is str:
        return text
    if get_origin(s.type) is tuple and not text.lstrip().startswith("["):
        parts = [p.strip() for p in text.split(",") if p.strip()]
        text = "[" + ", ".join(parts if get_args(s.type)[0] is not str else map(_toml, parts)) + "]"
    try:
        return _only_value(tomllib.loads(f"value = {text}"), text)
    except (ValueError, RecursionError):
        return text


def _only_value(table: dict[str, Any], text: str) -> Any:
    return table["value"] if len(table) == 1 else text


def _override(config: Config, values: Iterable[tuple[str, Any]], source: str) -> Config:
    known = {s.name: s for s in settings(config)}
    sources = dict(config.sources)
    where = source.removeprefix("file ")
    for name, value in values:
        known |= _of_group(name)
        if name not in known:
            raise ConfigError(f"{where}: there is no setting {_shown(name, bare=True)}; {_nearest(name, known)}.")
        section, key = name.rsplit(".", 1)
        values_now = replace(_values(config, section), **{key: _checked(known[name], value, where)})
        if section in SECTIONS:
            config = replace(config, **{section: values_now})
        else:
            group, _, member = section.partition(".")
            members: Any = {group: {**getattr(config, group), member: values_now}}
            config = replace(config, **members)
        sources[name] = source
    return replace(config, sources=sources)


def _values(config: Config, section: str) -> Any:
    if section in SECTIONS:
        return getattr(config, section)
    group, _, member = section.partition(".")
    return getattr(config, group).get(member, GROUPS[group][0]())


def _of_group(name: str) -> dict[str, Setting]:
    """The settings of the plan or provider that `name` is one of: any sound name makes one."""
    group, _, rest = name.partition(".")
    member = rest.rpartition(".")[0]
    if group not in GROUPS or not _GROUP_NAME.fullmatch(member) or (group == "providers" and member in TAKEN):
        return {}
    cls, known = GROUPS[group]
    return {s.name: s for s in _section(f"{group}.{member}", known.get(member, cls()))}


def _checked(s: Setting, value: Any, source: str) -> Any:
    """`value` in the setting's type. Raises ConfigError, saying what is allowed."""
    listed = get_origin(s.type) is tuple
    kind = get_args(s.type)[0] if listed else s.type
    items = value if listed else [value]
    if not isinstance(items, (list, tuple)) or not all(_fits(s, item, kind) for item in items):
        raise ConfigError(f"{source}: {s.name} must be {s.allowed}, not {_shown(value)}.")
    return tuple(kind(item) for item in items) if listed else kind(value)


def _fits(s: Setting, value: Any, kind: type) -> bool:
    if not _is(value, kind) or (s.choices and value not in s.choices) or not _parses(s, value):
        return False
    return s.low is None or s.high is None or s.low <= value <= s.high  # NaN lies in no range


def _parses(s: Setting, value: Any) -> bool:
    try:
        return s.parse is None or s.parse(value) is not None
    except ValueError:
        return False


def _is(value: Any, kind: type) -> bool:
    """Strictly: true is no number, and 5.0 no whole number; a whole number is a number; no text holds a NUL."""
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, str):
        return kind is str and "\0" not in value
    return isinstance(value, (int, float)) if kind is float else isinstance(value, kind)


def _shown(value: Any, *, bare: bool = False) -> str:
    """What was written, on one line and not too long; `bare` leaves out the quotes of a text."""
    try:
        text = repr(value)
    except ValueError:  # more digits than Python prints
        return "a huge number"
    return (text[1:-1] if bare else text)[:60]


def _nearest(name: str, known: Iterable[str], form: Callable[[str], str] = str) -> str:
    """The known name that was probably meant, as `form` writes it. A key in the wrong section is found too."""
    names = list(known)
    last = name.rpartition(".")[2]
    same_key = [n for n in names if n.rpartition(".")[2] == last]
    close = same_key or difflib.get_close_matches(name, names, 1, 0.0)
    return f"the nearest name is {form(close[0])}"

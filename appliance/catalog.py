"""The models of a data directory: which GGUF files there are, what they should hash to, and which one is served.

Owns `models/manifest.json` in the data directory and its lock. Does not load models and does not download any. A file
is hashed in full when it is added, on `verify`, and by `resolve` when its size, time or inode differ from those at
the last hashing; otherwise `resolve` costs one `stat` and the reading of the header.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import msgspec

from appliance.errors import ModelError
from appliance.gguf import GUIDE_KEY, PLACEHOLDER_KEY, GgufHeader, read_header
from appliance.messages import Nature

FORMAT = 1
PORTION = 4 * 1024 * 1024  # bytes hashed or copied at a time
YOUNG_NS = 2_000_000_000  # file systems stamp times as coarsely as this
LARGEST_MANIFEST = 16 * 1024 * 1024

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# what a chat template is built of, most telling first
_TEMPLATES = (
    ("chatml", "<|im_start|>"),
    ("llama3", "<|start_header_id|>"),
    ("gemma", "<start_of_turn>"),
    ("phi", "<|assistant|>"),
    ("mistral", "[INST]"),
)


class Seen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `stat` said when the file was last hashed."""

    mtime_ns: int
    inode: int
    size: int


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model as the manifest holds it; `file` is relative to the models directory, or absolute."""

    name: str
    file: str
    sha256: str
    size: int
    template: str
    licence: str
    placeholder: bool
    seen: Seen
    guide: bool = False


class _Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int = FORMAT
    chosen: str | None = None
    models: tuple[_Record, ...] = ()


@dataclass(frozen=True, slots=True)
class Model:
    """A model file that was found whole. `sha256` is empty where the file is in no manifest; `size` is in bytes.

    Usable wherever a path is wanted (`os.fspath`).
    """

    name: str
    path: Path
    size: int
    sha256: str
    template: str
    licence: str
    nature: Nature
    chosen: bool = False

    def __fspath__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `verify` found: `problem` is empty when the file is the one that was added."""

    model: Model
    problem: str = ""

    @property
    def good(self) -> bool:
        return not self.problem


class Catalog:
    """The manifest of one models directory. Every method reads it afresh: commands and server share it."""

    def __init__(self, models_dir: Path) -> None:
        self._dir = models_dir
        self._file = models_dir / "manifest.json"

    def entries(self) -> tuple[Model, ...]:
        """All models by name; whether their files are still there and whole is for `resolve` and `verify` to say."""
        manifest = self._read()
        return tuple(
            self._model(record, manifest) for record in sorted(manifest.models, key=lambda record: record.name)
        )

    def chosen(self) -> Model | None:
        """The model that `choose` named last, unchecked; None when there is none."""
        return next((model for model in self.entries() if model.chosen), None)

    def add(self, file: Path, *, name: str | None = None, copy: bool = False) -> Model:
        """Checks and hashes `file`, and records it under `name` (default: its stem); `copy` brings it in here first.

        Adding the same content again renews its record. ModelError when the file is no whole GGUF file, or when the
        name belongs to another model.
        """
        _refuse_split(read_header(file))
        name = _checked_name(name) if name is not None else _name_of(file)
        path = self._copied(file, name) if copy else Path(os.path.abspath(file))
        record = self._described(name, path)
        with self._locked():  # not while copying or hashing: a server that starts meanwhile would wait for it
            self._refuse_other(record)
            manifest = _with(self._read(), record)
            self._write(manifest)
            return self._model(record, manifest)

    def choose(self, name: str) -> Model:
        """Makes `name` the model that `serve` takes; ModelError when it is unknown."""
        with self._locked():
            manifest = self._read()
            record = self._record(name, manifest)
            manifest = msgspec.structs.replace(manifest, chosen=record.name)
            self._write(manifest)
            return self._model(record, manifest)

    def remove(self, name: str) -> Model:
        """Forgets `name` and returns what it was; the file stays. ModelError when it is unknown."""
        with self._locked():
            manifest = self._read()
            record = self._record(name, manifest)
            self._write(
                msgspec.structs.replace(
                    manifest,
                    chosen=None if manifest.chosen == name else manifest.chosen,
                    models=tuple(other for other in manifest.models if other.name != name),
                )
            )
            return self._model(record, manifest)

    def resolve(self, name_or_path: str | os.PathLike[str]) -> Model:
        """The model of that name, else the GGUF file at that path, found whole; ModelError says what is wrong.

        Hashes the file of a known model when it changed since it was last hashed, which takes seconds per gigabyte.
        """
        manifest = self._read()
        wanted = os.fspath(name_or_path)
        record = next((record for record in manifest.models if record.name == wanted), None)
        if record is None:
            record = self._by_path(wanted, manifest)
        if record is None:
            return _unrecorded(Path(wanted))
        self._check(record)
        return self._model(record, manifest)

    def verify(
        self, name: str | None = None, progress: Callable[[int], None] = lambda done: None
    ) -> tuple[Verdict, ...]:
        """Hashes the file of `name`, or of every model, in full; `progress` hears the bytes hashed of each file.

        ModelError only for an unknown name: what is wrong with a file stands in its verdict.
        """
        manifest = self._read()
        records = manifest.models if name is None else (self._record(name, manifest),)
        return tuple(self._verdict(record, manifest, progress) for record in records)

    def _verdict(self, record: _Record, manifest: _Manifest, progress: Callable[[int], None]) -> Verdict:
        model = self._model(record, manifest)
        try:
            self._check(record, always=True, progress=progress)
        except ModelError as error:
            return Verdict(model, error.message)
        return Verdict(model)

    def _check(
        self, record: _Record, *, always: bool = False, progress: Callable[[int], None] = lambda done: None
    ) -> None:
        path = self._path(record)
        header = read_header(path)
        if header.file_size != record.size:
            raise ModelError(
                f"The model file {path} has {header.file_size:,} bytes, but {record.size:,} when it was added; "
                f"restore it, or add it again."
            )
        if _seen(path) == record.seen and not always:
            return
        digest, seen = _hashed(path, progress)
        if digest != record.sha256:
            raise ModelError(
                f"The model file {path} is not the one that was added: its SHA-256 differs from {record.sha256[:12]}…; "
                f"restore it, or add it again."
            )
        if seen != record.seen:
            self._remember(record, seen)

    def _remember(self, record: _Record, seen: Seen) -> None:
        """Notes that the file was found good, so that the next start need not hash; a read-only directory may not."""
        with suppress(ModelError), self._locked():
            manifest = self._read()
            if record in manifest.models:
                self._write(_with(manifest, msgspec.structs.replace(record, seen=seen)))

    def _refuse_other(self, record: _Record) -> None:
        for known in self._read().models:
            same_place = _real(self._path(known)) == _real(self._path(record))
            if known.name == record.name and known.sha256 != record.sha256 and not same_place:
                raise ModelError(f"There is another model of the name {record.name}; choose another one with --name.")

    def _copied(self, file: Path, name: str) -> Path:
        target = Path(os.path.abspath(self._dir / f"{name}.gguf"))
        if target.exists():
            if target.samefile(file):
                return target
            raise ModelError(f"The file {target} exists already; choose another name for {file}.")
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        try:
            self._dir.mkdir(parents=True, exist_ok=True)
            _copy(file, partial)
            os.replace(partial, target)
        except OSError as error:
            raise ModelError(f"The model file {file} cannot be copied to {target}: {error.strerror}.") from error
        finally:
            with suppress(OSError):  # gone after the rename
                partial.unlink()
        return target

    def _described(self, name: str, path: Path) -> _Record:
        facts = _facts(read_header(path))
        digest, seen = _hashed(path)
        file = path.name if path.parent == Path(os.path.abspath(self._dir)) else str(path)
        return _Record(
            name, file, digest, seen.size, facts.template, facts.licence, facts.placeholder, seen, facts.guide
        )

    def _model(self, record: _Record, manifest: _Manifest) -> Model:
        return Model(
            name=record.name,
            path=self._path(record),
            size=record.size,
            sha256=record.sha256,
            template=record.template,
            licence=record.licence,
            nature=_nature(record.guide, record.placeholder),
            chosen=record.name == manifest.chosen,
        )

    def _path(self, record: _Record) -> Path:
        return Path(os.path.abspath(self._dir)) / record.file  # an absolute file stays what it is

    def _record(self, name: str, manifest: _Manifest) -> _Record:
        for record in manifest.models:
            if record.name == name:
                return record
        raise _unknown(name, [record.name for record in manifest.models])

    def _by_path(self, wanted: str, manifest: _Manifest) -> _Record | None:
        """The record of the file at `wanted`; ModelError when `wanted` reads as a name that nobody has."""
        if not _names_a_file(wanted):
            raise _unknown(wanted, [record.name for record in manifest.models])
        return next((record for record in manifest.models if _real(self._path(record)) == _real(Path(wanted))), None)

    def _read(self) -> _Manifest:
        try:
            with self._file.open("rb") as file:
                data = file.read(LARGEST_MANIFEST)
        except FileNotFoundError:
            return _Manifest()
        except OSError as error:
            raise ModelError(f"The manifest {self._file} cannot be read: {error.strerror}.") from error
        try:
            return _checked_manifest(msgspec.json.decode(data, type=_Manifest))
        except (ValueError, RecursionError) as error:
            raise ModelError(
                f"The manifest {self._file} is damaged ({error}); delete it and add the models again."
            ) from error

    def _write(self, manifest: _Manifest) -> None:
        partial = self._file.with_name(self._file.name + ".partial")
        data = json.dumps(msgspec.to_builtins(manifest), indent=2, ensure_ascii=False).encode()
        try:
            with partial.open("wb") as file:
                file.write(data + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self._file)
            _sync_directory(self._dir)
        except OSError as error:
            raise ModelError(f"The manifest {self._file} cannot be written: {error.strerror}.") from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the manifest against other processes between reading and writing it."""
        try:
            self._dir.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._dir / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ModelError(f"The models directory {self._dir} cannot be written: {error.strerror}.") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


@dataclass(frozen=True, slots=True)
class _Facts:
    template: str
    licence: str
    placeholder: bool
    guide: bool


def _nature(guide: bool, placeholder: bool) -> Nature:
    return "guide" if guide else "placeholder" if placeholder else "model"


def _facts(header: GgufHeader) -> _Facts:
    template = header.text("tokenizer.chat_template")
    kind = next((name for name, mark in _TEMPLATES if mark in template), "other" if template else "none")
    return _Facts(
        template=kind,
        licence=header.text("general.license", "unknown")[:200],
        placeholder=header.metadata.get(PLACEHOLDER_KEY) is True,
        guide=header.metadata.get(GUIDE_KEY) is True,
    )


def _unrecorded(path: Path) -> Model:
    header = read_header(path)
    _refuse_split(header)
    facts = _facts(header)
    return Model(
        _name_of(path),
        Path(os.path.abspath(path)),
        header.file_size,
        "",
        facts.template,
        facts.licence,
        _nature(facts.guide, facts.placeholder),
    )


def _refuse_split(header: GgufHeader) -> None:
    if header.number("split.count") > 1:
        raise ModelError(
            f"The model file {header.path} is one part of {header.number('split.count')}; "
            f"join them with `llama-gguf-split --merge` first."
        )


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ModelError(
            f"{name[:100]!r} is no name for a model: up to 100 letters, digits, dots, dashes and underscores, "
            f"the first of them a letter or digit."
        )
    return name


def _name_of(file: Path) -> str:
    stem = file.name.removesuffix(".gguf")
    return _checked_name(re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-")[:100] or "model")


def _names_a_file(wanted: str) -> bool:
    if os.sep in wanted or wanted.endswith(".gguf"):
        return True
    with suppress(OSError, ValueError):
        return Path(wanted).exists()
    return False


def _unknown(name: str, known: list[str]) -> ModelError:
    near = get_close_matches(name, known, n=1)
    if near:
        return ModelError(f"There is no model {name[:100]!r}; the nearest name is {near[0]!r}.")
    listing = f"known are {', '.join(sorted(known)[:10])}" if known else "none has been added yet"
    return ModelError(f"There is no model {name[:100]!r}; {listing}.")


def _checked_manifest(manifest: _Manifest) -> _Manifest:
    if manifest.version != FORMAT:
        raise ValueError(f"version {manifest.version} is not {FORMAT}")
    names = [record.name for record in manifest.models]
    if len(set(names)) != len(names) or not all(_NAME.fullmatch(name) for name in names):
        raise ValueError("a name is doubled or malformed")
    return manifest


def _with(manifest: _Manifest, record: _Record) -> _Manifest:
    others = tuple(other for other in manifest.models if other.name != record.name)
    return msgspec.structs.replace(manifest, models=(*others, record))


def _seen(path: Path) -> Seen:
    try:
        status = path.stat()
    except OSError as error:
        raise ModelError(f"The model file {path} cannot be read: {error.strerror}.") from error
    return Seen(status.st_mtime_ns, status.st_ino, status.st_size)


def _hashed(path: Path, progress: Callable[[int], None] = lambda done: None) -> tuple[str, Seen]:
    """The SHA-256 of a file that stood still meanwhile, and how to recognise that it has not changed since."""
    seen = _seen(path)
    digest = _sha256(path, progress)
    if _seen(path) != seen:
        raise ModelError(f"The model file {path} changed while it was read; try again when it is complete.")
    if (
        0 <= time.time_ns() - seen.mtime_ns < YOUNG_NS
    ):  # a change right now could leave the same time: hash again next time
        seen = msgspec.structs.replace(seen, mtime_ns=0)
    return digest, seen


def _sha256(path: Path, progress: Callable[[int], None] = lambda done: None) -> str:
    digest, done = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while portion := file.read(PORTION):
                digest.update(portion)
                done += len(portion)
                progress(done)
    except OSError as error:
        raise ModelError(f"The model file {path} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, PORTION)
        writer.flush()
        os.fsync(writer.fileno())


def _real(path: Path) -> str:
    return os.path.realpath(path)


def _sync_directory(path: Path) -> None:
    """Makes a rename in `path` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

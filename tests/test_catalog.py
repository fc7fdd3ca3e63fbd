"""The catalog of models: what is recorded, what is refused, and that a changed file never gets through."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from appliance import catalog
from appliance.catalog import Catalog
from appliance.errors import ModelError
from appliance.gguf import GUIDE_KEY, PLACEHOLDER_KEY, GgmlType, Writer


def make(path: Path, fill: int = 1, **keys: str) -> Path:
    """A small whole GGUF file; `fill` decides its tensor data."""
    writer = Writer(path)
    for key, value in keys.items():
        writer.string(key.replace("__", "."), value)
    writer.tensor("t", (1_024,), GgmlType.F32, lambda: [bytes([fill]) * 4_096])
    writer.write()
    return path


def same_length_other_bytes(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def shortened(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def lengthened(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def overwritten_with_text(path: Path) -> None:
    path.write_text("<html>404</html>" * 1_000)


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (same_length_other_bytes, "SHA-256 differs"),
    (shortened, "truncated"),
    (lengthened, "when it was added"),
    (overwritten_with_text, "not a GGUF"),
    (os.unlink, "does not exist"),
]


@pytest.fixture
def models(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "models")


def manifest(tmp_path: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((tmp_path / "models" / "manifest.json").read_text())
    return read


def test_an_empty_catalog_has_nothing(models: Catalog, tmp_path: Path) -> None:
    assert models.entries() == ()
    assert models.chosen() is None
    assert models.verify() == ()
    assert not (tmp_path / "models").exists()


def test_add_records_what_the_file_is(models: Catalog, tmp_path: Path) -> None:
    file = make(tmp_path / "Qwen 2.gguf", general__license="mit", tokenizer__chat_template="{{ '<|im_start|>' }}")
    model = models.add(file)
    assert model == models.entries()[0]
    assert (model.name, model.path, model.size) == ("Qwen-2", file, file.stat().st_size)
    assert model.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (model.template, model.licence, model.nature, model.chosen) == ("chatml", "mit", "model", False)
    assert os.fspath(model) == str(file)
    with pytest.raises(FrozenInstanceError):
        model.name = "other"  # type: ignore[misc]


def test_what_the_file_does_not_say_is_named_so(models: Catalog, tmp_path: Path) -> None:
    model = models.add(make(tmp_path / "plain.gguf"))
    assert (model.template, model.licence) == ("none", "unknown")
    odd = models.add(make(tmp_path / "odd.gguf", tokenizer__chat_template="{{ messages }}"))
    assert odd.template == "other"


def test_a_placeholder_says_so(models: Catalog, tmp_path: Path) -> None:
    writer = Writer(tmp_path / "stand-in.gguf")
    writer.boolean(PLACEHOLDER_KEY, True)
    writer.write()
    assert models.add(tmp_path / "stand-in.gguf").nature == "placeholder"
    assert models.add(make(tmp_path / "real.gguf", appliance__placeholder="true")).nature == "model"


def test_the_built_in_guide_says_so(models: Catalog, tmp_path: Path) -> None:
    writer = Writer(tmp_path / "guide.gguf")
    writer.boolean(GUIDE_KEY, True)
    writer.write()
    assert models.add(tmp_path / "guide.gguf").nature == "guide"
    assert models.resolve("guide").nature == models.resolve(tmp_path / "guide.gguf").nature == "guide"


def test_a_file_in_the_models_directory_moves_with_it(models: Catalog, tmp_path: Path) -> None:
    models.add(make(tmp_path / "models" / "tiny.gguf"))
    assert manifest(tmp_path)["models"][0]["file"] == "tiny.gguf"
    (tmp_path / "models").rename(tmp_path / "moved")
    assert Catalog(tmp_path / "moved").resolve("tiny").path == tmp_path / "moved" / "tiny.gguf"


def test_copy_brings_the_file_in(models: Catalog, tmp_path: Path) -> None:
    file = make(tmp_path / "outside.gguf")
    model = models.add(file, name="inside", copy=True)
    file.unlink()
    assert model.path == tmp_path / "models" / "inside.gguf"
    assert models.resolve("inside") == model
    assert sorted(os.listdir(tmp_path / "models")) == [".lock", "inside.gguf", "manifest.json"]


def test_copy_never_overwrites_another_file(models: Catalog, tmp_path: Path) -> None:
    models.add(make(tmp_path / "a" / "m.gguf", 1), copy=True)
    with pytest.raises(ModelError, match="exists already"):
        models.add(make(tmp_path / "b" / "m.gguf", 2), copy=True)
    assert models.verify()[0].good


def test_adding_again_renews_and_another_model_of_the_name_is_refused(models: Catalog, tmp_path: Path) -> None:
    file = make(tmp_path / "a" / "m.gguf", 1)
    first = models.add(file)
    assert models.add(file) == first
    same = make(tmp_path / "b" / "m.gguf", 1)
    assert models.add(same).path == same
    with pytest.raises(ModelError, match="another model of the name m"):
        models.add(make(tmp_path / "c" / "m.gguf", 2))
    make(same, 3)
    assert models.add(same).sha256 != first.sha256
    assert [model.path for model in models.entries()] == [same]


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "-x", "a b", "ä", "x" * 101, "a\n"])
def test_bad_names_are_refused(models: Catalog, tmp_path: Path, name: str) -> None:
    file = make(tmp_path / "m.gguf")
    with pytest.raises(ModelError, match="no name for a model"):
        models.add(file, name=name)
    assert models.entries() == ()
    assert models.add(file, name="x" * 100).name == "x" * 100


@pytest.mark.parametrize("name", ["日本.gguf", "....gguf", "ü b.gguf"])
def test_any_file_name_gives_a_valid_name(models: Catalog, tmp_path: Path, name: str) -> None:
    model = models.add(make(tmp_path / name))
    assert models.resolve(model.name) == model


def test_choose_and_remove(models: Catalog, tmp_path: Path) -> None:
    for name in ("b", "a"):
        models.add(make(tmp_path / f"{name}.gguf"))
    assert [model.name for model in models.entries()] == ["a", "b"]
    assert models.choose("b").chosen
    assert models.chosen() == models.choose("b")
    assert [model.chosen for model in models.entries()] == [False, True]
    models.add(tmp_path / "b.gguf")
    assert models.chosen() is not None, "adding again keeps the choice"
    models.remove("b")
    assert models.chosen() is None
    assert [model.name for model in models.entries()] == ["a"]
    assert (tmp_path / "b.gguf").exists()


def test_unknown_names_are_told_the_nearest(models: Catalog, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="none has been added yet"):
        models.choose("llama")
    models.add(make(tmp_path / "llama-3.gguf"))
    calls: list[Callable[[str], object]] = [models.choose, models.remove, models.resolve, models.verify]
    for call in calls:
        with pytest.raises(ModelError, match="nearest name is 'llama-3'"):
            call("llama-2")
        with pytest.raises(ModelError, match="known are llama-3"):
            call("zzz")


def test_resolve_takes_a_path_that_is_in_no_manifest(
    models: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make(tmp_path / "free.gguf", general__license="mit")
    model = models.resolve(file)
    assert (model.name, model.path, model.sha256, model.licence) == ("free", file, "", "mit")
    monkeypatch.chdir(tmp_path)
    assert models.resolve("free.gguf").path == file
    for wanted in ("missing.gguf", "no/such", "./x", "a/\0b"):
        with pytest.raises(ModelError):
            models.resolve(wanted)


@pytest.mark.parametrize(("damage", "expected"), DAMAGE)
def test_a_damaged_file_is_refused_by_name_by_path_and_by_verify(
    models: Catalog, tmp_path: Path, damage: Callable[[Path], None], expected: str
) -> None:
    file = make(tmp_path / "m.gguf")
    models.add(file)
    assert models.resolve("m").path == models.resolve(file).path == file
    assert models.verify("m")[0].good
    damage(file)
    link = tmp_path / "link.gguf"
    link.symlink_to(file)
    for wanted in ("m", file, link if file.exists() else file):
        with pytest.raises(ModelError, match=expected) as caught:
            models.resolve(wanted)
        assert caught.value.exit_code == 9 and "\n" not in caught.value.message
    (verdict,) = models.verify()
    assert not verdict.good and expected in verdict.problem


def test_an_unchanged_file_is_not_hashed_again_and_a_touched_one_is_once(
    models: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = aged(make(tmp_path / "m.gguf"), days=2)
    models.add(file)
    hashed = counted_hashes(monkeypatch)
    models.resolve("m")
    assert hashed == []
    aged(file, days=1)
    models.resolve("m")
    models.resolve("m")
    assert hashed == [file]


def test_a_file_written_just_now_is_hashed_again_since_its_time_proves_nothing(
    models: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make(tmp_path / "m.gguf")
    models.add(file)
    hashed = counted_hashes(monkeypatch)
    models.resolve("m")
    assert hashed == [file]


def counted_hashes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are hashed from now on."""
    hashed: list[Path] = []
    real = catalog._sha256

    def counting(path: Path, progress: Callable[[int], None]) -> str:
        hashed.append(path)
        return real(path, progress)

    monkeypatch.setattr(catalog, "_sha256", counting)
    return hashed


def aged(file: Path, days: int) -> Path:
    then = time.time() - days * 86_400
    os.utime(file, (then, then))
    return file


def test_verify_hashes_even_where_time_and_size_are_unchanged(models: Catalog, tmp_path: Path) -> None:
    file = aged(make(tmp_path / "m.gguf"), days=1)
    models.add(file)
    status = file.stat()
    with file.open("r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        handle.write(b"\x55")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert models.resolve("m").path == file, "the cheap check cannot see this"
    assert "SHA-256 differs" in models.verify("m")[0].problem


def test_verify_judges_each_model_by_itself_and_tells_progress(models: Catalog, tmp_path: Path) -> None:
    for name in ("good", "bad"):
        models.add(make(tmp_path / f"{name}.gguf"))
    same_length_other_bytes(tmp_path / "bad.gguf")
    heard: list[int] = []
    verdicts = {verdict.model.name: verdict.good for verdict in models.verify(progress=heard.append)}
    assert verdicts == {"good": True, "bad": False}
    assert heard == [(tmp_path / "good.gguf").stat().st_size] * 2


@pytest.mark.parametrize(("damage", "expected"), DAMAGE[1:2] + DAMAGE[3:])
def test_add_refuses_what_is_no_whole_model(
    models: Catalog, tmp_path: Path, damage: Callable[[Path], None], expected: str
) -> None:
    file = make(tmp_path / "m.gguf")
    damage(file)
    for copy in (False, True):
        with pytest.raises(ModelError, match=expected):
            models.add(file, copy=copy)
    assert models.entries() == ()


def test_one_part_of_a_split_model_is_refused(models: Catalog, tmp_path: Path) -> None:
    writer = Writer(tmp_path / "m-00001-of-00003.gguf")
    writer.uint32("split.count", 3)
    writer.write()
    for call in (models.add, models.resolve):
        with pytest.raises(ModelError, match="one part of 3"):
            call(tmp_path / "m-00001-of-00003.gguf")


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"{",
        b"[]",
        b'{"version": 2}',
        b'{"version": 1, "surprise": 1}',
        b'{"version": 1, "models": [{"name": "x"}]}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_a_damaged_manifest_is_refused_and_kept(models: Catalog, tmp_path: Path, damaged: bytes) -> None:
    file = make(tmp_path / "models" / "m.gguf")
    models.add(file)
    (tmp_path / "models" / "manifest.json").write_bytes(damaged)
    for call in (models.entries, models.chosen, lambda: models.resolve("m"), lambda: models.add(file)):
        with pytest.raises(ModelError, match="manifest .* is damaged"):
            call()
    assert (tmp_path / "models" / "manifest.json").read_bytes() == damaged


def test_names_in_a_manifest_are_checked_too(models: Catalog, tmp_path: Path) -> None:
    models.add(make(tmp_path / "m.gguf"))
    written = manifest(tmp_path)
    for names in (["../../etc"], ["m", "m"]):
        records = [written["models"][0] | {"name": name} for name in names]
        (tmp_path / "models" / "manifest.json").write_text(json.dumps(written | {"models": records}))
        with pytest.raises(ModelError, match="doubled or malformed"):
            models.entries()


def test_a_failed_write_keeps_the_old_manifest(
    models: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.add(make(tmp_path / "a.gguf"))
    before = manifest(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(ModelError, match=r"manifest .* cannot be written: No space left"):
            models.choose("a")
    assert manifest(tmp_path) == before
    assert models.choose("a").chosen


def test_a_models_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")
    with pytest.raises(ModelError, match="cannot be"):
        Catalog(tmp_path / "models").add(make(tmp_path / "m.gguf"))


def test_simultaneous_changes_are_all_kept(tmp_path: Path) -> None:
    files = [make(tmp_path / f"m{number}.gguf", number) for number in range(8)]
    threads = [threading.Thread(target=Catalog(tmp_path / "models").add, args=(file,)) for file in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Catalog(tmp_path / "models").entries()) == 8


def test_the_checkout_s_manifest_has_the_documented_fields() -> None:
    folder = Path(__file__).parents[1] / "models"
    shipped = json.loads((folder / "manifest.json").read_text())
    readme = (folder / "README.md").read_text()
    fields = {"name", "file", "sha256", "size", "template", "licence"}
    assert shipped["version"] == catalog.FORMAT
    assert all(set(model) == fields for model in shipped["models"])
    assert all(f"`{field}`" in readme for field in fields)

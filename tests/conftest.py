"""Fixtures that several test modules share: the tiny models, made once per run by the product's own writer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance import tinymodel
from tests.box import Box


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The placeholder model, as `appliance init` makes it."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    tinymodel.write(path)
    return path


@pytest.fixture(scope="session")
def tiny_f32_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in F32, for comparing logits."""
    path = tmp_path_factory.mktemp("models") / "tiny-f32.gguf"
    tinymodel.write(path, f32=True)
    return path


@pytest.fixture(scope="session")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A real appliance with defaults and the placeholder model, shared by tests that leave it as it was."""
    with Box.start(tmp_path_factory.mktemp("box")) as running:
        yield running

"""The layers: higher ranks import lower ones only, no cycles, one importer per heavy library. Checked with ast."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "appliance"

RANKS = {
    "config": 0, "errors": 0, "messages": 0, "logs": 0,
    "engine": 1, "secretfiles": 1, "store": 1, "gguf": 1, "tinymodel": 1, "benchmodel": 1, "tls": 1,
    "access": 2, "providers": 2,
    "chat": 3, "catalog": 3, "doctor": 3, "installation": 3, "administration": 4,
    "api": 5,
    "admin": 6, "app": 6, "cli": 6, "server": 6, "__main__": 6,
}  # fmt: skip

ONE_IMPORTER = {
    "llama_cpp": {"appliance.engine.model"},
    "sqlite_utils": {"appliance.store"},
    "sqlcipher3": {"appliance.store"},
    "uvicorn": {"appliance.server"},
    "click": {"appliance.cli"},
    "httpx": {"appliance.providers.upstream"},
}

NEVER = {("engine", "store"), ("providers", "store"), ("engine", "access"), ("store", "access")}


def modules() -> dict[str, Path]:
    return {".".join(p.relative_to(ROOT.parent).with_suffix("").parts): p for p in sorted(ROOT.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Every module that `path` imports, at any depth of the code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            base = node.module or ""
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {base} | (names & set(modules()))
    return found


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("module", [m for m in modules() if part(m) and not m.endswith("__init__")])
def test_imports_go_down_the_ranks(module: str) -> None:
    own = part(module)
    assert own in RANKS, f"{own} has no rank: give it one"
    for name in imports(modules()[module]):
        other = part(name)
        if name.split(".")[0] == "appliance" and other and other != own:
            assert RANKS[other] <= RANKS[own], f"{module} ({RANKS[own]}) imports {name} ({RANKS[other]})"
            assert (own, other) not in NEVER, f"{module} must not import {name}"


@pytest.mark.parametrize("library", sorted(ONE_IMPORTER))
def test_each_heavy_library_has_one_importer(library: str) -> None:
    users = {m for m, p in modules().items() if any(n.split(".")[0] == library for n in imports(p))}
    allowed = ONE_IMPORTER[library]
    assert users, f"nobody imports {library}: the table is out of date"
    assert all(any(u == a or u.startswith(a + ".") for a in allowed) for u in users), users


def test_there_is_no_import_cycle() -> None:
    graph = {m: {n for n in imports(p) if n in modules() and n != m} for m, p in modules().items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in graph[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_check_itself_sees_an_import(tmp_path: Path) -> None:
    sample = tmp_path / "sample.py"
    sample.write_text("def f():\n    from appliance.engine import model\n    import llama_cpp.llama\n")
    assert {"appliance.engine.model", "llama_cpp.llama"} <= imports(sample)

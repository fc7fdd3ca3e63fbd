"""Who may call what: every path, method, scope and plan, as routes and gate really decide, beside the table that
is checked in (`truth_table.txt`). A new route without a row fails; `python -m tests.test_truth_table` prints the table.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response

from appliance.access.admission import Admission, Terms
from appliance.api import endpoints
from appliance.api.access_log import AccessLog
from appliance.api.gate import Gate
from appliance.api.guard import Guard
from appliance.api.limits import Limits
from appliance.api.services import Services
from appliance.config import PLANS
from appliance.messages import Caller, Scope

TABLE = Path(__file__).with_name("truth_table.txt")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
SCOPES: tuple[Scope | None, ...] = (None, *get_args(Scope))
IN = 204  # what the stand-in for every handler answers


def _nobody_pays(caller: Caller | None, ip: str, *, wrong_key: bool = False) -> Terms:
    return Terms()


async def _in(request: Request, services: Services) -> Response:
    return Response(status_code=IN)


class Stack:
    """The real routes, gate and layers around handlers that only say that they were reached."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        table = tuple(replace(endpoint, handler=_in) for endpoint in endpoints.ENDPOINTS)
        monkeypatch.setattr(endpoints, "ENDPOINTS", table)
        gate = Gate(Admission(wait_seconds=1.0), None, _nobody_pays)  # type: ignore[arg-type]
        router = endpoints.Routes(None, gate)  # type: ignore[arg-type]
        self.caller: Caller | None = None
        self.paths = [path for endpoint in table for path in (endpoint.path, *endpoint.aliases)]
        self.app = AccessLog(Limits(Guard(self._as(router)), gate.admission, gate.terms_of))

    def _as(self, app: Any) -> Any:
        async def called(scope: Any, receive: Any, send: Any) -> None:
            scope["state"]["caller"], scope["state"]["wrong_key"] = self.caller, False
            await app(scope, receive, send)

        return called

    def lines(self) -> Iterator[str]:
        """One line per path and method: what each scope gets, by plan where the plans differ."""
        for path in dict.fromkeys(self.paths):
            for method in METHODS:
                found = asyncio.run(self._outcomes(method, path))
                yield f"{method:6} {path:24} " + " ".join(f"{scope}={outcome}" for scope, outcome in found)

    async def _outcomes(self, method: str, path: str) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test") as client:
            for scope in SCOPES:
                by_plan = {}
                for plan in PLANS:
                    self.caller = Caller("a", "team", plan, "k", scope) if scope else None
                    by_plan[plan] = (await client.request(method, path)).status_code
                same = len(set(by_plan.values())) == 1
                shown = {"any": by_plan["community"]} if same else by_plan
                told = "/".join(f"{'in' if s == IN else s}{'' if same else f'({p})'}" for p, s in shown.items())
                found.append((scope or "nobody", told))
        return found


def test_who_may_call_what_is_as_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    found, written = list(Stack(monkeypatch).lines()), TABLE.read_text().splitlines()
    assert found == written, "if this is meant: python -m tests.test_truth_table > tests/truth_table.txt"


def test_the_table_shows_a_route_that_is_new_and_a_gate_that_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    *others, chat = endpoints.ENDPOINTS
    new = endpoints.Endpoint("GET", "/new", _in, "read")
    monkeypatch.setattr(endpoints, "ENDPOINTS", (*others, replace(chat, scope=None), new))
    found = set(Stack(monkeypatch).lines()) - set(TABLE.read_text().splitlines())
    assert {line.split()[1] for line in found} == {"/new", "/llm/chat", "/api/llm/chat", "/api/v1/llm/chat"}


def test_what_changes_state_is_no_get() -> None:
    """Links, previews and prefetching are GETs."""
    assert [e.path for e in endpoints.ENDPOINTS if e.method == "GET"] == [
        "/healthz",
        "/readyz",
        "/metrics",
        "/openapi.json",
        "/api/usage",
        "/api/egress",
        "/v1/models",
        "/v1/models/{name:path}",
    ]


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        print("\n".join(Stack(patch).lines()))

"""THE table of endpoints: method, paths, handler, scope. Routes, gate and tests read it; nothing else decides access.

A handler takes the request and the services and returns a response. The gate runs on the matched route, before a byte
of the body is read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from appliance.api import health, llm
from appliance.api.services import Services
from appliance.errors import Forbidden, Unauthorized
from appliance.messages import Caller, Scope

Handler = Callable[[Request, Services], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One row: `scope` None is open to everybody, else the key's scope must be `full` or this one."""

    method: str
    path: str
    handler: Handler
    scope: Scope | None
    aliases: tuple[str, ...] = ()


def under_api(path: str) -> tuple[str, ...]:
    """The two prefixes under which the seed's paths answer, too."""
    return (f"/api{path}", f"/api/v1{path}")


ENDPOINTS = (
    Endpoint("GET", "/healthz", health.healthz, None),
    Endpoint("GET", "/readyz", health.readyz, None),
    Endpoint("POST", "/llm/chat", llm.chat, "llm", under_api("/llm/chat")),
)


def allow(endpoint: Endpoint, caller: Caller | None) -> None:
    """Raises Unauthorized or Forbidden unless `caller` may use `endpoint`."""
    if endpoint.scope is None:
        return
    if caller is None:
        raise Unauthorized
    reads = caller.scope == "read" and endpoint.method == "GET"
    if caller.scope not in ("full", endpoint.scope) and not reads:
        raise Forbidden(f"This key's scope is {caller.scope}; the endpoint needs full or {endpoint.scope}.")


def routes(services: Services) -> list[BaseRoute]:
    """One Starlette route per path; methods of the same path share it, so that a wrong one gets the whole `Allow`."""
    by_path: dict[str, dict[str, Endpoint]] = defaultdict(dict)
    for endpoint in ENDPOINTS:
        for path in (endpoint.path, *endpoint.aliases):
            by_path[path][endpoint.method] = endpoint
    return [Route(path, _gated(path, methods, services), methods=list(methods)) for path, methods in by_path.items()]


def _gated(path: str, methods: dict[str, Endpoint], services: Services) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        request.state.endpoint = path
        endpoint = methods["GET" if request.method == "HEAD" else request.method]
        allow(endpoint, request.state.caller)
        return await endpoint.handler(request, services)

    return handle

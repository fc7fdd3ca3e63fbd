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

from appliance.api import health, llm, metrics, usage
from appliance.api.gate import Gate
from appliance.api.services import Services
from appliance.errors import NotFound
from appliance.messages import Scope

Handler = Callable[[Request, Services], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One row: `scope` None is open to everybody, else the key's scope must be `full` or this one. A call `counts` in
    its windows and `leases` one of its account's places; the handler that `queues` waits for the turn itself."""

    method: str
    path: str
    handler: Handler
    scope: Scope | None
    aliases: tuple[str, ...] = ()
    counts: bool = True
    leases: bool = True
    queues: bool = False


def under_api(path: str) -> tuple[str, ...]:
    """The two prefixes under which the seed's paths answer, too."""
    return (f"/api{path}", f"/api/v1{path}")


ENDPOINTS = (
    Endpoint("GET", "/healthz", health.healthz, None),
    Endpoint("GET", "/readyz", health.readyz, None),
    Endpoint("GET", "/metrics", metrics.metrics, None),
    Endpoint("GET", "/api/usage", usage.own_usage, "full", ("/api/v1/usage",), leases=False),
    Endpoint("POST", "/llm/chat", llm.chat, "llm", under_api("/llm/chat"), queues=True),
)


def routes(services: Services, gate: Gate) -> list[BaseRoute]:
    """One Starlette route per path; methods of the same path share it, so that a wrong one gets the whole `Allow`."""
    by_path: dict[str, dict[str, Endpoint]] = defaultdict(dict)
    for endpoint in ENDPOINTS:
        for path in (endpoint.path, *endpoint.aliases):
            by_path[path][endpoint.method] = endpoint
    return [
        Route(path, _gated(path, methods, services, gate), methods=list(methods)) for path, methods in by_path.items()
    ]


def _gated(
    path: str, methods: dict[str, Endpoint], services: Services, gate: Gate
) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        if b"%" in request.scope["raw_path"]:  # no path of ours needs it, and a proxy's rules may not see through it
            gate.refuse(request)
            raise NotFound("There is no such endpoint.")
        request.state.endpoint = path
        endpoint = methods["GET" if request.method == "HEAD" else request.method]
        gate.allow(request, endpoint.scope)
        if endpoint.scope is not None:
            await gate.enter(request, path, counts=endpoint.counts, leases=endpoint.leases, waits=not endpoint.queues)
        return await endpoint.handler(request, services)

    return handle

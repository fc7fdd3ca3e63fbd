"""THE table of endpoints: method, paths, handler, scope. Routes, gate and tests read it; nothing else decides access.

A handler takes the request and the services and returns a response. The gate runs on the matched route, before a byte
of the body is read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import compile_path
from starlette.types import Receive, Send
from starlette.types import Scope as ASGIScope

from appliance.api import anthropic, egress, health, llm, metrics, openai, responses, usage
from appliance.api.gate import Gate
from appliance.api.openapi import document
from appliance.api.services import Services
from appliance.errors import MethodNotAllowed, NotFound
from appliance.messages import Scope

Handler = Callable[[Request, Services], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One row: `scope` None is open to everybody, else the key's scope must be `full` or this one. A call `counts` in
    its windows and `leases` one of its account's places; the handler that `queues` waits for the turn itself, and can
    stream. `body`, `reply` and `query` are for the documentation."""

    method: str
    path: str
    handler: Handler
    scope: Scope | None
    aliases: tuple[str, ...] = ()
    body: type[Struct] | None = None
    reply: type[Struct] | None = None
    query: tuple[str, ...] = ()
    counts: bool = True
    leases: bool = True
    queues: bool = False


def under_api(path: str) -> tuple[str, ...]:
    """The two prefixes under which the seed's paths answer, too."""
    return (f"/api{path}", f"/api/v1{path}")


def as_groq(path: str) -> tuple[str, ...]:
    """Where Groq's own clients expect OpenAI's routes."""
    return (f"/openai/v1{path}",)


async def openapi(request: Request, services: Services) -> Response:
    """This description of all routes."""
    return Response(_described(), media_type="application/json")


@cache
def _described() -> bytes:
    return msgspec.json.encode(document(ENDPOINTS))


ENDPOINTS = (
    Endpoint("GET", "/healthz", health.healthz, None),
    Endpoint("GET", "/readyz", health.readyz, None),
    Endpoint("GET", "/metrics", metrics.metrics, None),
    Endpoint("GET", "/openapi.json", openapi, None),
    Endpoint(
        "GET", "/api/usage", usage.own_usage, "full", ("/api/v1/usage",), reply=usage.UsageReply, leases=False
    ),
    Endpoint(
        "GET", "/api/egress", egress.own_egress, "full", ("/api/v1/egress",),
        reply=egress.EgressReply, query=("since",),
        leases=False,
    ),
    Endpoint(
        "GET", "/v1/models", openai.models, "llm", as_groq("/models"), reply=openai.ModelsReply, leases=False
    ),
    Endpoint(
        "GET", "/v1/models/{name:path}", openai.model, "llm", as_groq("/models/{name:path}"),
        reply=openai.ModelBody, leases=False,
    ),
    Endpoint(
        "POST", "/v1/chat/completions", openai.chat_completions, "llm", as_groq("/chat/completions"),
        body=openai.ChatBody, reply=openai.ChatReply, queues=True,
    ),
    Endpoint(
        "POST", "/v1/completions", openai.completions, "llm",
        body=openai.CompletionBody, reply=openai.TextReply, queues=True,
    ),
    Endpoint(
        "POST", "/v1/responses", responses.responses, "llm",
        body=responses.ResponsesBody, reply=responses.Reply, queues=True,
    ),
    Endpoint(
        "POST", "/v1/messages", anthropic.messages, "llm",
        body=anthropic.MessagesBody, reply=anthropic.MessageReply, queues=True,
    ),
    Endpoint(
        "POST", "/v1/messages/count_tokens", anthropic.count_tokens, "llm",
        body=anthropic.CountBody, reply=anthropic.CountReply,
        leases=False,
    ),
    Endpoint(
        "POST", "/llm/chat", llm.chat, "llm", under_api("/llm/chat"),
        body=llm.ChatBody, reply=llm.ChatReply, queues=True,
    ),
)  # fmt: skip


class Routes:
    """The table as an app: one look-up per call, however long the table; the few paths with parameters by pattern."""

    def __init__(self, services: Services, gate: Gate) -> None:
        self._services = services
        self._gate = gate
        paths: dict[str, dict[str, Endpoint]] = defaultdict(dict)
        for endpoint in ENDPOINTS:
            for path in (endpoint.path, *endpoint.aliases):
                paths[path][endpoint.method] = endpoint
        self._exact = {path: (path, methods) for path, methods in paths.items() if "{" not in path}
        self._patterns = [(compile_path(path), path, methods) for path, methods in paths.items() if "{" in path]

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        path, endpoint = self._find(request)
        request.state.endpoint = path
        self._gate.allow(request, endpoint.scope)
        if endpoint.scope is not None:
            counts, leases, waits = endpoint.counts, endpoint.leases, not endpoint.queues
            await self._gate.enter(request, path, counts=counts, leases=leases, waits=waits)
        response = await endpoint.handler(request, self._services)
        await response(scope, receive, send)

    def _find(self, request: Request) -> tuple[str, Endpoint]:
        """The row, and under which of its paths. Raises NotFound or MethodNotAllowed, for which strangers pay."""
        scope = request.scope
        # Only a parameter may be spelt with %: a proxy's rules may not see through it.
        found = self._exact.get(scope["path"]) if b"%" not in scope["raw_path"] else None
        found = found or self._match(scope)
        if found is None:
            self._gate.refuse(request)
            raise NotFound("There is no such endpoint.")
        path, methods = found
        method = scope["method"]
        endpoint = methods.get("GET" if method == "HEAD" else method)
        if endpoint is None:
            self._gate.refuse(request)
            allow = ", ".join(sorted({*methods, "HEAD"} if "GET" in methods else methods))
            takes = f"This endpoint does not take {method[:20]}; it takes {allow}."
            raise MethodNotAllowed(takes, headers={"Allow": allow})
        return path, endpoint

    def _match(self, scope: ASGIScope) -> tuple[str, dict[str, Endpoint]] | None:
        for (pattern, _, convertors), path, methods in self._patterns:
            begin = path[: path.index("{")]
            if scope["raw_path"].startswith(begin.encode()) and (match := pattern.match(scope["path"])):
                scope["path_params"] = {name: convertors[name].convert(v) for name, v in match.groupdict().items()}
                return path, methods
        return None

"""OpenAI's API under `/v1`: what its clients send, and exactly what they expect back. Decides nothing by itself."""

from __future__ import annotations

import time

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from appliance.api.services import Services

STARTED = int(time.time())  # clients want a date of each model; a file's own says nothing


class ModelBody(Struct):
    """One model."""

    id: str
    created: int = STARTED
    owned_by: str = "local"
    object: str = "model"


class ModelsReply(Struct):
    data: list[ModelBody]
    object: str = "list"


async def models(request: Request, services: Services) -> Response:
    """The models that answer here."""
    reply = ModelsReply([ModelBody(services.local.loaded.name)])
    return Response(msgspec.json.encode(reply), media_type="application/json", headers={"Cache-Control": "no-store"})

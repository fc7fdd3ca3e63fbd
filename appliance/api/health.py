"""`/healthz`: the process answers. `/readyz`: the model is loaded, and what it can take."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from appliance import __version__
from appliance.api.services import Services
from appliance.errors import Draining


def _json(body: dict[str, object]) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json", headers={"Cache-Control": "no-store"})


async def healthz(request: Request, services: Services) -> Response:
    """200 as long as the process serves."""
    return _json({"status": "ok", "version": __version__})


async def readyz(request: Request, services: Services) -> Response:
    """200 with the model's name, queue length and largest single prompt; 503 while nothing can be answered."""
    if request.app.draining:
        raise Draining("The server is stopping.", retry_after=5)
    loaded = services.local.loaded
    status = services.local.status()
    return _json(
        {
            "status": "ready",
            "model": loaded.name,
            "guide": status["guide"],
            "placeholder": status["placeholder"],
            "queue": status["waiting"],
            "running": status["running"],
            "slots": status["slots"],
            "largest_prompt": status["largest_prompt"],
        }
    )

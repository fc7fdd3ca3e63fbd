"""`/healthz`: the process answers. `/readyz`: the model is loaded, and what it can take."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from appliance import __version__
from appliance.api.render import json_reply
from appliance.api.services import Services
from appliance.errors import Draining


async def healthz(request: Request, services: Services) -> Response:
    """200 as long as the process serves."""
    return json_reply({"status": "ok", "version": __version__})


async def readyz(request: Request, services: Services) -> Response:
    """200 with the model's name, queue length and largest single prompt; 503 while nothing can be answered."""
    if request.app.draining:
        raise Draining("The server is stopping.", retry_after=5)
    loaded = services.local.loaded
    status = services.local.status()
    return json_reply(
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

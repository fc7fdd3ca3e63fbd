"""What our server counts, asked through its admin socket."""

from __future__ import annotations

import asyncio
from typing import Any

from appliance import admin
from appliance.errors import ApplianceError
from scripts.benchlib.run import say
from scripts.benchlib.servers import Server


async def counters(server: Server) -> dict[str, Any]:
    """The engine's counters; empty when the server does not tell, so that every figure that needs one says so."""
    if server.data_dir is None:
        return {}
    path = admin.socket_path(server.data_dir)
    try:
        answer = await asyncio.to_thread(admin.call, path, "status", {})
    except ApplianceError as error:
        say(f"The server's counters cannot be read: {error.message}")
        return {}
    return flat(answer) if isinstance(answer, dict) else {}


def flat(answer: dict[str, Any]) -> dict[str, Any]:
    """All values of an answer in one level; those further out win."""
    inner = {k: v for value in answer.values() if isinstance(value, dict) for k, v in flat(value).items()}
    return {**inner, **{k: v for k, v in answer.items() if not isinstance(v, dict)}}

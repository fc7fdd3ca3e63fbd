"""`GET /api/egress`: what of the caller's account has left the box; never what was said."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from appliance.api.render import json_reply
from appliance.api.services import Services
from appliance.errors import BadRequest
from appliance.messages import Caller
from appliance.store import egress

MOST = 1_000  # rows


class RowBody(Struct):
    """One exchange with a server elsewhere; the time in ISO 8601, sizes in bytes."""

    at: str
    key_id: str
    destination: str
    bytes_out: int
    bytes_in: int
    reason: str
    request_id: str


class EgressReply(Struct):
    prompts: str  # the account's and key's policy now
    rows: list[RowBody]


async def own_egress(request: Request, services: Services) -> Response:
    """The newest rows, oldest first; `since` a day on."""
    caller: Caller = request.state.caller
    since = _day(request.query_params.get("since", "1970-01-01"))
    rows = await asyncio.to_thread(egress.listing, services.store, since, MOST, caller.account_id)
    shown = [
        RowBody(_iso(row.at), row.key_id, row.destination, row.bytes_out, row.bytes_in, row.reason, row.request_id)
        for row in rows
    ]
    return json_reply(EgressReply(caller.prompts, shown))


def _day(text: str) -> float:
    try:
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII):
            raise ValueError
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).timestamp()
    except ValueError:
        raise BadRequest("since must be a day such as 2027-01-31.", param="since") from None


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

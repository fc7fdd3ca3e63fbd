"""How an error looks over HTTP: the seed's shape. The only place that renders one."""

from __future__ import annotations

from typing import Any

import msgspec

from appliance.errors import ApplianceError

WORTH_WAITING = 60  # seconds; clients that retry by themselves are told not to for longer waits


def error_body(error: ApplianceError, request_id: str) -> bytes:
    """`{"success": false, "error": …, "code": …}`, with `retry_after` on 429 and 503."""
    body: dict[str, Any] = {"success": False, "error": error.message, "code": error.code}
    if _retries(error):
        body["retry_after"] = error.retry_after
    return msgspec.json.encode(body | {"request_id": request_id})


def error_headers(error: ApplianceError) -> list[tuple[bytes, bytes]]:
    """The error's own headers, and `Retry-After` where the body has `retry_after`."""
    headers = {"content-type": "application/json", "cache-control": "no-store", **error.headers}
    if _retries(error):
        headers["retry-after"] = str(error.retry_after)
        if (error.retry_after or 0) > WORTH_WAITING:
            headers["x-should-retry"] = "false"
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()]


def _retries(error: ApplianceError) -> bool:
    return error.status in (429, 503) and error.retry_after is not None

"""How answers look over HTTP: JSON, and errors in the three forms that clients expect, which are rendered only here."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from starlette.responses import Response

from appliance.errors import ApplianceError, ModelNotFound, MonthlyLimitReached, PromptTooLong

OVERLOADED = 529
WORTH_WAITING = 60  # seconds; clients that retry by themselves are told not to for longer waits

Family = Literal["seed", "openai", "anthropic"]

# The names that OpenAI's and Anthropic's clients know a status by.
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_OPENAI_CODES = {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded"}
_ANTHROPIC_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip


def json_reply(body: Any) -> Response:
    """200 with a struct or a dictionary."""
    return Response(msgspec.json.encode(body), media_type="application/json", headers={"Cache-Control": "no-store"})


def family(path: str) -> Family:
    """In whose form the answers of a path are."""
    if not path.startswith(("/v1/", "/openai/v1/")):
        return "seed"
    return "anthropic" if path.startswith("/v1/messages") else "openai"


def error_status(error: ApplianceError, path: str) -> int:
    """Anthropic's clients know a full box by another number."""
    return OVERLOADED if error.status == 503 and family(path) == "anthropic" else error.status


def error_body(error: ApplianceError, request_id: str, path: str = "") -> bytes:
    """The JSON of an error on `path`."""
    render = {"seed": _seed, "openai": _openai, "anthropic": _anthropic}[family(path)]
    return msgspec.json.encode(render(error, request_id))


def _seed(error: ApplianceError, request_id: str) -> dict[str, Any]:
    """`{"success": false, "error": …, "code": …}`, with `retry_after` on 429 and 503."""
    body: dict[str, Any] = {"success": False, "error": error.message, "code": error.code}
    if _retries(error):
        body["retry_after"] = error.retry_after
    return body | {"request_id": request_id}


def _openai(error: ApplianceError, request_id: str) -> dict[str, Any]:
    """`{"error": {"message": …, "type": …, "param": …, "code": …}}`; the code is always a text."""
    kind = _OPENAI_TYPES.get(error.status) or ("server_error" if error.status >= 500 else "invalid_request_error")
    code = _OPENAI_CODES.get(error.status, error.code.lower())
    more: dict[str, Any] = {}
    if isinstance(error, ModelNotFound):
        code = "model_not_found"
    elif isinstance(error, PromptTooLong):
        code = "context_length_exceeded"
        more = {"n_prompt_tokens": error.prompt_tokens, "n_ctx": error.context_tokens}
    elif isinstance(error, MonthlyLimitReached):
        kind = code = "insufficient_quota"
    about = {"message": error.message, "type": kind, "param": error.param, "code": code}
    return {"error": about | more, "request_id": request_id}


def _anthropic(error: ApplianceError, request_id: str) -> dict[str, Any]:
    """`{"type": "error", "error": {"type": …, "message": …}, "request_id": …}`."""
    kind = _ANTHROPIC_TYPES.get(error.status) or ("api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": request_id}


def error_event(error: ApplianceError, request_id: str, path: str = "") -> bytes:
    """The last event of a stream that an error ends."""
    name = b"event: error\n" if family(path) == "anthropic" else b""
    return name + b"data: " + error_body(error, request_id, path) + b"\n\n"


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

"""The error tree. Raise where it happens; `api/guard.py` renders it over HTTP, `cli.py` on a terminal.

ApplianceError
├── RequestError            the caller can mend it
│   ├── BadRequest          400
│   │   ├── PromptTooLong   400   carries both numbers
│   │   ├── MethodNotAllowed 405
│   │   ├── RequestTimeout  408
│   │   ├── Conflict        409
│   │   ├── PayloadTooLarge 413
│   │   ├── UnsupportedMediaType 415
│   │   └── HeadersTooLarge 431
│   ├── Unauthorized        401
│   ├── Forbidden           403
│   ├── NotFound            404
│   │   └── ModelNotFound   404
│   ├── RateLimited         429
│   └── MonthlyLimitReached 429
├── InternalError           500
├── Unavailable             503
│   ├── Saturated           503   the waiting line is full
│   ├── QueueTimeout        503   waited its whole deadline
│   ├── ModelNotReady       503   no model is loaded
│   └── Draining            503   the server is stopping
└── OperatorError           ends a command or a start, with a named exit code
    ├── UsageError 2 · ConfigError 3 · NotInitialised 4 · AlreadyRunning 5 · AddressInUse 6
    ├── DataDirError 7 · KeyFileError 8 · ModelError 9 · BackupError 10 · ServerUnreachable 11
    └── EngineBroken 70     the context broke twice; the supervisor restarts the process
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class ApplianceError(Exception):
    """Base of every error that a user may see. `message` is one clear sentence and never holds a secret."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "INTERNAL_ERROR"
    exit_code: int = 1

    def __init__(
        self,
        message: str,
        *,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after  # seconds, an integer >= 1; only on 429 and 503
        self.headers: dict[str, str] = dict(headers or {})
        self.param = param  # the field of the body that is at fault, such as `messages[0].role`


class RequestError(ApplianceError):
    """The caller can mend it."""

    status, code = 400, "BAD_REQUEST"


class BadRequest(RequestError):
    """The body or a parameter is not what the endpoint takes."""


class PromptTooLong(BadRequest):
    """The prompt does not fit the context; `prompt_tokens` and `context_tokens` say by how much."""

    def __init__(self, prompt_tokens: int, context_tokens: int, *, at_least: bool = False) -> None:
        about = "at least " if at_least else ""
        super().__init__(
            f"The prompt has {about}{prompt_tokens} tokens; the largest prompt this model's context takes here "
            f"is {context_tokens}."
        )
        self.prompt_tokens = prompt_tokens
        self.context_tokens = context_tokens


class MethodNotAllowed(BadRequest):
    """The path exists, but not with this method; the `Allow` header names the methods."""

    status = 405


class RequestTimeout(BadRequest):
    """The request did not arrive in time."""

    status = 408


class Conflict(BadRequest):
    """The thing exists already, or changed meanwhile."""

    status = 409


class PayloadTooLarge(BadRequest):
    """The body is over the endpoint's cap."""

    status = 413


class UnsupportedMediaType(BadRequest):
    """The body's type or encoding is not one the endpoint reads."""

    status = 415


class HeadersTooLarge(BadRequest):
    """The request head is over the cap."""

    status = 431


class Unauthorized(RequestError):
    """No valid key. One text for every reason, so that nothing can be learned from it."""

    status, code = 401, "UNAUTHORIZED"

    def __init__(self) -> None:
        super().__init__("Missing or invalid API key", headers={"WWW-Authenticate": "Bearer"})


class Forbidden(RequestError):
    """The key is good, but not for this."""

    status, code = 403, "FORBIDDEN"


class NotFound(RequestError):
    """No such endpoint or resource (or somebody else's)."""

    status, code = 404, "NOT_FOUND"


class ModelNotFound(NotFound):
    """No model of that name answers here."""


class RateLimited(RequestError):
    """A window or the plan's concurrency refused the call."""

    status, code = 429, "RATE_LIMIT_EXCEEDED"
    window: str = ""  # that is used up


class MonthlyLimitReached(RequestError):
    """The month's calls are used up."""

    status, code = 429, "MONTHLY_LIMIT_EXCEEDED"
    window = "month"


class InternalError(ApplianceError):
    """Our fault; the log has the trace under the request id."""


class Unavailable(ApplianceError):
    """The box cannot serve this now; `retry_after` says when to ask again (60 s where nothing better is known)."""

    status, code = 503, "SERVICE_UNAVAILABLE"

    def __init__(
        self, message: str, *, retry_after: int | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message, retry_after=retry_after or 60, headers=headers)


class Saturated(Unavailable):
    """The waiting line is full."""


class QueueTimeout(Unavailable):
    """The call waited its whole deadline without a free slot."""


class ModelNotReady(Unavailable):
    """No model is loaded; everything else answers."""


class Draining(Unavailable):
    """The server is stopping and takes no new work."""


class OperatorError(ApplianceError):
    """Ends a command or a start with one sentence and `exit_code`."""


class UsageError(OperatorError):
    """The command's words are off."""

    exit_code = 2


class ConfigError(OperatorError):
    """A setting is unknown, of the wrong type or out of range."""

    exit_code = 3


class NotInitialised(OperatorError):
    """The data directory holds no appliance yet."""

    exit_code = 4


class AlreadyRunning(OperatorError):
    """Another process holds the data directory."""

    exit_code = 5


class AddressInUse(OperatorError):
    """The address cannot be bound."""

    exit_code = 6


class DataDirError(OperatorError):
    """The data directory cannot be read or written."""

    exit_code = 7


class KeyFileError(OperatorError):
    """The master key is missing, malformed, readable by others, or not this database's."""

    exit_code = 8


class ModelError(OperatorError):
    """A model file is missing, truncated, of the wrong hash or not loadable."""

    exit_code = 9


class BackupError(OperatorError):
    """A backup could not be made, or did not prove good."""

    exit_code = 10


class ServerUnreachable(OperatorError):
    """The running server does not answer on its admin socket."""

    exit_code = 11


class EngineBroken(OperatorError):
    """The model context broke twice; a restart is the only cure."""

    exit_code = 70

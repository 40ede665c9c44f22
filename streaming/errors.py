"""Errors, each with its own wire form: status, code, and whether to come back.

RivuletError                 500  internal
├── BadRequest               400  bad_request        the body or the query cannot be read at all
├── Unauthorized             401  unauthorized       or as given: which token or ticket, why
├── Forbidden                403  forbidden          known, and not allowed to
├── InvalidField             422  invalid_field      one field is wrong; `param` names it
├── TooLarge                 413  too_large
├── NotFound                 404  not_found          also what is somebody else's
├── Gone                     410  gone               a position that cannot be resumed
├── Conflict                 409  as given
├── TooMany                  429  rate_limited       as given, with Retry-After
├── Unavailable              503  as given, with Retry-After
└── UpstreamError            4xx, 502, 504           the model call failed; see UPSTREAM
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class RivuletError(Exception):
    """An error that a client sees.

    message: for a person. code: for a program, stable. param: the field at fault.
    retry_after: seconds after which coming back makes sense, sent as `Retry-After`. headers: others
    that the answer has.
    """

    status: int = 500
    code: str = "internal"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        status: int | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.headers = dict(headers or {})
        if code is not None:
            self.code = code
        if status is not None:
            self.status = status

    def body(self, request_id: str = "") -> dict[str, Any]:
        """The object under `error`, the same in responses, `failed` events and WebSocket frames."""
        error: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.param is not None:
            error["param"] = self.param
        error["request_id"] = request_id
        return error


class CannotStart(Exception):
    """What the configuration asks for is not to be had here. The message is for the operator."""


class BadRequest(RivuletError):
    status = 400
    code = "bad_request"


class Unauthorized(RivuletError):
    status = 401
    code = "unauthorized"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message, code=code, headers={"WWW-Authenticate": "Bearer"})  # RFC 6750


class Forbidden(RivuletError):
    status = 403
    code = "forbidden"


class InvalidField(RivuletError):
    status = 422
    code = "invalid_field"

    def __init__(self, param: str, message: str, *, code: str | None = None) -> None:
        super().__init__(f"{param}: {message}", param=param, code=code)


class TooLarge(RivuletError):
    status = 413
    code = "too_large"


class NotFound(RivuletError):
    status = 404
    code = "not_found"


class Gone(RivuletError):
    status = 410
    code = "gone"


class Conflict(RivuletError):
    status = 409
    code = "conflict"


class TooMany(RivuletError):
    status = 429
    code = "rate_limited"


class Unavailable(RivuletError):
    status = 503
    code = "unavailable"


class UpstreamError(RivuletError):
    """A model call failed. `code` is a row of UPSTREAM, which gives the status and whether a retry
    may help as long as no token has come; `status` overrides the row's (a rejection keeps its own).
    """

    # code -> (status, worth another attempt before the first token)
    UPSTREAM: ClassVar[dict[str, tuple[int, bool]]] = {
        "upstream_unreachable": (502, True),  # refused, reset while connecting, no such host, TLS
        "connect_timeout": (504, True),
        "first_token_timeout": (504, True),
        "idle_timeout": (504, False),  # silence between two tokens
        "total_timeout": (504, False),
        "upstream_rate_limited": (429, True),
        "upstream_unauthorized": (502, False),  # our key was refused: not the client's fault
        "upstream_rejected": (400, False),  # another 4xx: the request itself was refused
        "upstream_failed": (502, True),  # 5xx, or an error event in the stream
        "upstream_cut": (502, True),  # ended or reset without a finish reason
        "upstream_invalid": (502, True),  # bytes that are no chunk of this protocol
        "too_long": (502, False),  # the answer passed max_bytes
    }

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        status: int | None = None,
        retry_after: float | None = None,
        upstream_status: int | None = None,
    ) -> None:
        default, self.retryable = self.UPSTREAM[code]
        super().__init__(
            message, code=code, param=param, status=status or default, retry_after=retry_after
        )
        self.upstream_status = upstream_status


def owner_lost() -> RivuletError:
    """The instance that made this is gone, and its end with it."""
    return RivuletError("the server that made this answer is gone", status=502, code="owner_lost")

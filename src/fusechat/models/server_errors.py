"""Faults of one request to an OpenAI-compatible server, from the client's exceptions."""

import json
import math
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from fusechat.errors import first_line

OTHER_SHAPE = (
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    ValueError,
    RecursionError,
)  # not JSON, or JSON of another shape
_ASK_AGAIN = (408, 409, 429)  # and 5xx
_LONGEST = 200  # characters of a server's message
_SECRET = 4  # characters; a shorter key is a placeholder such as "x"


@dataclass(frozen=True)
class Fault:
    """`said`: one line. `wait`: seconds that the server asks to wait. `code`, `param`: as in OpenAI's errors."""

    kind: Literal["refused", "broken", "timeout", "malformed", "status"]  # refused: no connection
    said: str
    status: int | None = None
    code: str = ""
    param: str = ""
    wait: float | None = None

    @property
    def heard(self) -> bool:
        """Whether the server replied at all."""
        return self.kind in ("malformed", "status")

    @property
    def may_pass(self) -> bool:
        """Whether a retry may help."""
        return self.status is None or self.status in _ASK_AGAIN or self.status >= 500


def fault_of(error: Exception, openai: Any, *, timeout: float, secret: str) -> Fault:
    """The fault of a client exception. `timeout`: the request's, in seconds. `secret`: the key, which is removed from messages.
    Exceptions of the HTTP library, which differs by version, are recognised by class name."""
    cause = type(error.__cause__).__name__
    if isinstance(error, openai.APIStatusError):
        wait = _seconds(error.response.headers.get("retry-after"))
        code, param = getattr(error, "code", None) or "", getattr(error, "param", None) or ""
        said = f"status {error.status_code}: {_shortened(said_by_server(error), secret)}"
        return Fault("status", said, status=error.status_code, code=str(code), param=str(param), wait=wait)
    if isinstance(error, openai.APITimeoutError) and cause == "ConnectTimeout":
        return Fault("timeout", "no connection in time")
    if isinstance(error, openai.APITimeoutError | TimeoutError):
        return Fault("timeout", f"no answer within {timeout:g} s")
    if isinstance(error, openai.APIConnectionError):
        why = _shortened(root_cause(error), secret)
        refused = cause == "ConnectError"
        return (
            Fault("refused", f"no connection ({why})") if refused else Fault("broken", f"a broken connection ({why})")
        )
    return Fault("malformed", f"no chat completion came ({_shortened(first_line(error), secret)})")


def _shortened(text: str, secret: str) -> str:
    """One line of at most 200 characters."""
    if len(secret) >= _SECRET:
        text = text.replace(secret, "…")
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"


def said_by_server(error: Exception) -> str:
    """The server's own message, else the client's."""
    body: Any = getattr(error, "body", None)
    for name in ("error", "message", "detail"):  # {"error": {"message": …}}, {"error": …}, {"detail": …}
        if isinstance(body, dict) and body.get(name):
            body = body[name]
    said = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False) if body else ""
    return said.strip() or first_line(error)


def root_cause(error: BaseException) -> str:
    """The innermost cause, such as `Connection refused`."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    if isinstance(error, BaseExceptionGroup):  # for a host with several addresses
        return root_cause(error.exceptions[0])
    number = getattr(error, "errno", None)
    return os.strerror(number) if number and number > 0 else first_line(error)


def _seconds(header: str | None) -> float | None:
    """The seconds of a `Retry-After` header, a number or a date."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            until = parsedate_to_datetime(header)
        except ValueError:
            return None
        seconds = (until.replace(tzinfo=until.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None

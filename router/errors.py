"""Every error that Rungway names, split by whose fault it is.

`CallerError`: the request is wrong or not allowed. `UpstreamError`: one attempt at one rung failed;
the pipeline decides whether to go on. `RouterFault`: no answer can be had, or we are at fault.
`ConfigError` exists only before the start and at a reload.

An error carries all that its answer needs; `api/reply.py` is the one place that renders it, and
`transport/failures.py` and `core/refusal.py` are the two that turn the world's failures into these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from router.types import Answer


class RouterError(Exception):
    """Abstract: raise one of its children.

    `status` is the HTTP status of the answer, `kind` the envelope's `type`, `code` its `code`,
    `param` the offending parameter, `retry_after_s` the seconds to wait (None: unknown).
    `lacks_money`: the limits of the call's key had a part in it, so another key may fare better.
    `rungs`: where a whole plan failed, why each rung was not taken, as `explain` has it.
    """

    status = 500
    kind = "server_error"
    code: str | None = None
    origin = "router"
    # Most faults may pass; a caller's own mistake does not.
    should_retry = True
    lacks_money = False
    rungs: Sequence[dict[str, Any]] = ()

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        if type(self) in (RouterError, CallerError, RouterFault):
            raise TypeError(f"{type(self).__name__} is abstract: raise one of its children")
        # Text from outside may hold lone surrogates, which no JSON can carry.
        message = message.encode("utf-8", "replace").decode()
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code
        self.param = param
        self.retry_after_s = retry_after_s


# --- the caller's -------------------------------------------------------------------------------


class CallerError(RouterError):
    """The request is at fault; no rung is tried."""

    status = 400
    kind = "invalid_request_error"
    should_retry = False


class BadRequest(CallerError):
    """The body or a header cannot be understood."""


class Unauthenticated(CallerError):
    status = 401
    code = "invalid_api_key"


class Forbidden(CallerError):
    status = 403
    code = "forbidden"


class UnknownModel(CallerError):
    status = 404
    code = "model_not_found"


class UnknownUrl(CallerError):
    status = 404
    code = "unknown_url"


class UnknownKey(CallerError):
    """No key, or no session, has this name."""

    status = 404
    code = "key_not_found"


class Conflict(CallerError):
    """What is asked for cannot be done to what is there."""

    status = 409
    code = "conflict"


class MethodNotAllowed(CallerError):
    status = 405
    code = "method_not_allowed"

    def __init__(self, message: str, *, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


class SlowRequest(CallerError):
    """The client did not send its body in time."""

    status = 408
    code = "request_timeout"


class TooLarge(CallerError):
    status = 413
    code = "request_too_large"


class RateLimited(CallerError):
    """A key's own limit; worth trying again later."""

    status = 429
    kind = "rate_limit_error"
    code = "rate_limit_exceeded"
    should_retry = True


# The `code` of a RateLimited where only calls under way hold what this one needs.
BUDGET_IN_USE = "budget_in_use"


class QuotaUsedUp(CallerError):
    """A key's budget is spent; it opens again in `retry_after_s`, and no retry helps before."""

    status = 429
    kind = "insufficient_quota"
    code = "insufficient_quota"


class IdempotencyKeyReused(CallerError):
    """The same Idempotency-Key came with another request."""

    status = 422
    code = "idempotency_key_reused"


# --- the upstream's -----------------------------------------------------------------------------


class UpstreamError(RouterError):
    """One attempt failed. `cause` is a short stable word for metrics, plans and logs.

    `moves_on`: the next rung may be tried. `cool_s`: keep away from the rung for so long (None:
    no cool-down); `closes` says whether that holds for the `rung` or for its whole `backend`.
    `upstream_status` is what the upstream answered, where it answered at all.
    """

    status = 502
    kind = "upstream_error"
    code: str | None = "upstream_error"
    origin = "upstream"
    cause = "failed"
    moves_on = True
    upstream_status: int | None = None

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        cool_s: float | None = None,
        closes: str = "rung",
    ) -> None:
        super().__init__(message, code=code, param=param, retry_after_s=retry_after_s)
        self.cool_s = cool_s
        self.closes = closes


class ConnectFailed(UpstreamError):
    """Nothing was sent: refused, unreachable, unknown host, TLS not agreed."""

    cause = "connect"
    code = "upstream_unreachable"


class UpstreamTimeout(UpstreamError):
    """A phase's time limit passed; `phase` is connect, first_token, idle, answer or total."""

    status = 504
    code = "upstream_timeout"

    def __init__(self, message: str, *, phase: str) -> None:
        super().__init__(message)
        self.phase = phase
        self.cause = f"timeout_{phase}"


class UpstreamBusy(UpstreamError):
    """429 or its kin: the upstream has no room now."""

    status = 429
    kind = "rate_limit_error"
    code = "rate_limit_exceeded"
    cause = "busy"


class UpstreamFailed(UpstreamError):
    """5xx, TGI's 424, an error inside a 200."""

    cause = "failed"


class UpstreamBroken(UpstreamError):
    """Not what was asked for: cut, malformed, wrong content type, a redirect, too large."""

    cause = "broken"
    code = "upstream_broken"


class StaleConnection(UpstreamBroken):
    """A kept connection that the upstream had closed before any of the request reached it.

    Certain, not guessed: the same request may be sent again on a new connection.
    """

    cause = "stale"


class UpstreamAsleep(UpstreamError):
    """The backend is asleep, paused or starting; others may answer meanwhile."""

    cause = "asleep"
    code = "upstream_asleep"


class RungRefused(UpstreamError):
    """The rung's own refusal: our token, its quota, its model list."""

    cause = "refused"
    code = "upstream_refused"


class UpstreamTooLarge(UpstreamError):
    """This rung's limit of size is too small for the request; another may take it."""

    status = 413
    kind = "invalid_request_error"
    code = "request_too_large"
    cause = "too_large"
    should_retry = False


class PromptTooLong(UpstreamError):
    """This rung's context is too small; a later one may have room."""

    status = 400
    kind = "invalid_request_error"
    code = "context_length_exceeded"
    cause = "prompt_too_long"
    should_retry = False


class Echoed(UpstreamBroken):
    """Asked to go on with an answer, the rung began it anew: its text has no honest place."""

    cause = "echoed"
    moves_on = False


class Escalated(UpstreamError):
    """The rung answered, and its ladder asks for a better answer: `why` is its word for that.

    `answer` is the body or the frames of what it said: where no rung does better, the last such
    answer is still the answer.
    """

    code = "escalated"

    def __init__(self, message: str, *, why: str, answer: Answer | bytes) -> None:
        super().__init__(message)
        self.cause = f"escalated_{why}"
        self.answer = answer


class CallerMistake(UpstreamError):
    """The upstream blames the request, and every other rung would too."""

    status = 400
    kind = "invalid_request_error"
    code = None
    cause = "caller_mistake"
    moves_on = False
    should_retry = False

    def __init__(
        self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message, code=code, param=param)
        self.status = status


# --- ours ---------------------------------------------------------------------------------------


class RouterFault(RouterError):
    """No answer can be had."""


class NoRungLeft(RouterFault):
    """Every rung was skipped or failed."""

    kind = "upstream_error"
    code = "no_rung_left"

    def __init__(
        self,
        message: str,
        *,
        status: int,
        kind: str = "upstream_error",
        code: str = "no_rung_left",
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, code=code, param=param, retry_after_s=retry_after_s)
        self.status = status
        self.kind = kind
        # Room comes back, so a caller who waits as told may succeed; the rest was tried already.
        self.should_retry = status == 429


class Draining(RouterFault):
    """The daemon is going down."""

    status = 503
    code = "draining"


class StateUnavailable(RouterFault):
    """The store of budgets and keys is slow, locked, full or gone: not the key's fault."""

    status = 503
    code = "state_unavailable"


class InternalFault(RouterFault):
    """Our own mistake; the log has the trace under the request id."""

    code = "internal_error"


# --- before the start ---------------------------------------------------------------------------


class ConfigError(Exception):
    """The configuration is refused; each problem names file, line, path, fault and mend."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)

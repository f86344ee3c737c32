"""Every request comes here: guarded, sent to its route, its errors rendered, its line written."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from router.api import hooks, keys, openai, ops, usage
from router.api.answer import send
from router.api.exchange import Exchange, RequestIds
from router.api.reply import Reply, error_reply, json_reply
from router.api.request import Request
from router.api.routes import Caller, Handler, Route, Routes
from router.api.service import Service, Shared
from router.api.sink import header_text
from router.config.addresses import is_loopback
from router.errors import (
    BadRequest,
    Draining,
    InternalFault,
    MethodNotAllowed,
    RouterError,
    UnknownUrl,
)
from router.flow.observe import Record

_log = logging.getLogger("rungway")

_SHOWN_CHARS_MAX = 200


class Gateway:
    """The handler of the server. `service` may be replaced while requests are served."""

    def __init__(
        self, service: Service, shared: Shared, reload: Callable[[], Awaitable[str | None]]
    ) -> None:
        self.service = service
        self._reload = reload
        self.shared = shared
        self._ids = RequestIds()
        ops.answer_other_workers(shared, lambda: self.service)
        self._routes = Routes(
            {
                "": {
                    "GET": Route(_sync(ops.front), Caller.ANYBODY),
                    "POST": Route(openai.hugging_face_inputs),
                },
                "/chat/completions": {"POST": Route(openai.chat_completions, is_hot=True)},
                "/embeddings": {"POST": Route(openai.create_embeddings, is_hot=True)},
                "/hooks/hub": {"POST": Route(hooks.hub, Caller.ANYBODY)},
                "/models": {"GET": Route(openai.list_models)},
                "/models/*": {"GET": Route(openai.get_model)},
                "/health": {"GET": Route(ops.health, Caller.OPERATOR)},
                "/ready": {"GET": Route(_sync(ops.ready), Caller.OPERATOR)},
                "/metrics": {"GET": Route(ops.metrics, Caller.OPERATOR)},
                "/router/v1/explain": {"POST": Route(ops.explain)},
                "/router/v1/keys": {
                    "GET": Route(keys.list_keys, Caller.ADMIN),
                    "POST": Route(keys.create_key, Caller.ADMIN),
                },
                "/router/v1/keys/*": {
                    "GET": Route(keys.show_key, Caller.ADMIN),
                    "DELETE": Route(keys.revoke_key, Caller.ADMIN),
                },
                "/router/v1/keys/*/rotate": {"POST": Route(keys.rotate_key, Caller.ADMIN)},
                "/router/v1/reload": {"POST": Route(self._reload_now, Caller.ADMIN)},
                "/router/v1/sessions": {
                    "GET": Route(keys.list_sessions),
                    "POST": Route(keys.create_session),
                },
                "/router/v1/sessions/*": {"DELETE": Route(keys.end_session)},
                "/router/v1/status": {"GET": Route(ops.status, Caller.ADMIN)},
                "/router/v1/usage": {"GET": Route(usage.show_usage)},
                "/router/v1/usage/resolve": {"POST": Route(usage.resolve, Caller.ADMIN)},
            }
        )
        # What most ask for is not taken apart each time.
        self._hot_paths = {target: _plain_path(target) for _, target in self._routes.hot()}

    async def handle(self, request: Request) -> None:
        """Answer one request. Raises ConnectionError where its client has left."""
        target = request.target
        path = self._hot_paths.get(target) or _plain_path(target)
        exchange = Exchange(request, path or "/", self._ids.next(), self.service, self.shared)
        reply = await self._serve(exchange, path)
        if reply is not None:
            await send(request, reply, exchange.lines())

    async def _serve(self, exchange: Exchange, path: str) -> Reply | None:
        """The answer, where it is not written yet. Raises ConnectionError."""
        request, record = exchange.request, exchange.record
        try:
            return await self._answer(exchange, path)
        except RouterError as error:
            record.status = error.status
            record.error = record.error or error.code or error.kind
            if record.error in ("request_too_large", "request_timeout"):
                # What is left of the body is not worth reading.
                request.part()
            return error_reply(error, _attempts(record))
        except (ConnectionError, asyncio.CancelledError):
            record.error = record.error or "client_left"
            raise
        except Exception:
            # The last edge: what fails here must not take the connection's other requests along.
            _log.exception("%s failed in a way nobody foresaw", exchange.id)
            record.status, record.error = 500, "internal_error"
            if request.is_begun:
                # An answer has begun; a second one inside it would be a lie.
                request.abort()
                raise ConnectionError("the answer has begun and cannot become an error") from None
            fault = InternalFault(f"Rungway failed; its log has the trace of {exchange.id}")
            return error_reply(fault)
        finally:
            if record.task or record.error:
                record.total_s = exchange.elapsed_s()
                if not record.goes_on:
                    self.shared.observer.record(record)

    def hot_routes(self) -> list[tuple[str, str]]:
        """The method and target of each request that most ask for."""
        return self._routes.hot()

    def refuse(self, error: RouterError) -> Reply:
        """The answer to bytes that are no request, with an id and a line of its own."""
        record = Record(self._ids.next(), "(unreadable)")
        record.status, record.error = error.status, error.code or error.kind
        self.shared.observer.record(record)
        return error_reply(error, {"x-request-id": record.call_id})

    async def _answer(self, exchange: Exchange, path: str) -> Reply | None:
        request, guard = exchange.request, self.service.guard
        method, host = request.method, request.header("host")
        if method == "OPTIONS" and request.header("access-control-request-method") is not None:
            guard.check_browser(host, None)
            wanted = request.header("access-control-request-headers")
            allowed = guard.preflight(exchange.origin, wanted)
            return Reply(204, None, headers=allowed)
        guard.check_browser(host, exchange.origin)
        method = "GET" if method == "HEAD" else method
        route, exchange.argument = self._find(method, path, request.target)
        caller = route.caller
        if caller is Caller.OPERATOR:
            needs_key = self.service.ops_need_key and not _is_from_here(request)
            caller = Caller.ADMIN if needs_key else Caller.ANYBODY
        elif self.shared.is_draining:
            raise Draining("Rungway is going down; ask again in a moment")
        if caller is not Caller.ANYBODY:
            key = exchange.recognise() or await exchange.authenticate()
            if caller is Caller.ADMIN:
                ops.require_admin(key)
        return await route.handler(exchange)

    def _find(self, method: str, path: str, asked: str) -> tuple[Route, str]:
        """`asked` is what the client asked for, as it wrote it, for what it is told."""
        found = self._routes.find(path)
        if found is None:
            raise UnknownUrl(f"there is no {_shown(asked)} here; docs/api.md lists the routes")
        methods, argument = found
        route = methods.get(method)
        if route is None:
            allow = ", ".join(sorted(methods))
            raise MethodNotAllowed(f"{_shown(asked)} takes {allow}, not {method}", allow=allow)
        return route, argument

    async def _reload_now(self, exchange: Exchange) -> Reply:
        refused = await self._reload()
        if refused is not None:
            raise BadRequest(refused, code="configuration_refused")
        return json_reply({"reloaded": True})


def _is_from_here(request: Request) -> bool:
    """Whether the caller is on this machine: a container's own health check is."""
    peer = request.peer
    return isinstance(peer, tuple) and is_loopback(str(peer[0]))


def _plain_path(target: str) -> str:
    """The path as the routes are named: still encoded, without `/v1` and the trailing slash."""
    path = target
    if path.startswith(("http://", "https://")):
        # The absolute form that clients use towards a proxy.
        path = "/" + path.split("/", 3)[3] if path.count("/") > 2 else "/"
    path = path.partition("?")[0].rstrip("/")
    if path == "/v1" or path.startswith("/v1/"):
        path = path[3:]
    return path


def _shown(target: str) -> str:
    path = target.partition("?")[0]
    return path if len(path) <= _SHOWN_CHARS_MAX else path[:_SHOWN_CHARS_MAX] + "…"


def _attempts(record: Record) -> dict[str, str]:
    """What was tried for an answer that is an error."""
    if not record.attempts:
        return {}
    last = header_text(record.attempts[-1].rung.name)
    return {"x-rungway-attempts": str(len(record.attempts)), "x-rungway-rung": last}


def _sync(handler: Callable[[Exchange], Reply]) -> Handler:
    async def call(exchange: Exchange) -> Reply:
        return handler(exchange)

    return call

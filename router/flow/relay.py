"""One attempt's answer to the client: withheld until it has content, then passed on as it comes.

The commit is the first content, reasoning, tool or finish event; chunks with only a role wait for
it. All events of one upstream read go out in one write. While the client does not read, nothing is
read from upstream, and no time limit of the upstream's runs.
"""

from __future__ import annotations

from collections.abc import Callable

from router.backends.base import Backend, ChatAttempt, EmbedAttempt, Event, EventKind
from router.core import sse
from router.core.chunks import ChunkWatch
from router.core.embeddings import fit
from router.errors import UpstreamBroken, UpstreamError
from router.flow.canaries import Canaries
from router.flow.observe import Record
from router.flow.patience import Patience
from router.flow.sink import Provenance, Sink
from router.types import ChatCall, Rung, Usage

# Chunks that hold only a role are small and few; more of them is a fault, not an answer.
_WITHHELD_BYTES_MAX = 1 << 20
# How long a stream whose choices are all finished may take for its usage and its [DONE].
_GRACE_S = 2.0
# A rough mean over languages, for answers whose usage no upstream reports.
_CHARS_PER_TOKEN = 4


async def answer(
    backend: Backend, attempt: ChatAttempt, sink: Sink, record: Record, provenance: Provenance
) -> None:
    """A whole chat answer."""
    async with Patience(attempt.rung.name) as patience:
        patience.wait("answer", attempt.call.ladder.limits.answer_s)
        whole = await backend.complete_chat(attempt)
    record.usage = whole.usage
    await sink.send_answer(whole, provenance)


async def embeddings(
    backend: Backend,
    attempt: EmbedAttempt,
    sink: Sink,
    record: Record,
    provenance: Provenance,
    canaries: Canaries,
) -> None:
    """A whole embeddings answer, of a rung that is known to share the ladder's vector space."""
    async with Patience(attempt.rung.name) as patience:
        patience.wait("answer", attempt.call.ladder.limits.answer_s)
        await canaries.ensure(backend, attempt)
        vectors = await backend.embed(attempt)
        vectors = fit(vectors, attempt.call.dimensions, who=attempt.rung.name)
    record.usage = vectors.usage
    await sink.send_embeddings(vectors, provenance)


async def stream(
    backend: Backend,
    attempt: ChatAttempt,
    sink: Sink,
    record: Record,
    provenance: Provenance,
    since_start_s: Callable[[], float],
) -> None:
    """A streamed chat answer, to its end. Raises UpstreamError where it breaks."""
    relay = _Relay(attempt.rung, attempt.call)
    try:
        await _pass_on(backend, attempt, sink, record, provenance, since_start_s, relay)
        await sink.write(relay.finish(), provenance)
        await sink.end()
    finally:
        record.usage = relay.usage()


async def _pass_on(
    backend: Backend,
    attempt: ChatAttempt,
    sink: Sink,
    record: Record,
    provenance: Provenance,
    since_start_s: Callable[[], float],
    relay: _Relay,
) -> None:
    """Pass the stream's events on until it is done, or whole and then broken or silent."""
    limits = attempt.call.ladder.limits
    try:
        async with Patience(attempt.rung.name) as patience:
            patience.wait("first_token", limits.first_token_s)
            opened = await backend.stream_chat(attempt)
            try:
                while not relay.is_done and (events := await opened.read()):
                    frames = relay.take(events)
                    if relay.comments:
                        await sink.comment(relay.comments)
                    if frames and (relay.error is None or sink.is_committed):
                        if record.first_token_s is None:
                            record.first_token_s = since_start_s()
                        patience.pause()
                        await sink.write(frames, provenance)
                        # Once it is whole, only a usage chunk and [DONE] can come.
                        grace_s = _GRACE_S if relay.is_whole else limits.idle_s
                        patience.wait("idle", min(grace_s, limits.idle_s))
                    if relay.error is not None:
                        raise relay.error
            finally:
                opened.close()
    except UpstreamError:
        if not relay.is_whole:
            raise


class _Relay:
    """What becomes of one stream's events: frames to send, withheld until there is content."""

    def __init__(self, rung: Rung, call: ChatCall) -> None:
        self._rung = rung
        self._wants_usage = call.wants_usage
        self._input_tokens = max(1, call.needs.prompt_chars // _CHARS_PER_TOKEN)
        self._watch = ChunkWatch(
            who=rung.name,
            call_id=call.id,
            wants_usage=call.wants_usage,
            choices_wanted=call.body.get("n") or 1,
        )
        self._withheld: list[bytes] = []
        self._withheld_bytes = 0
        self._has_content = False
        self.is_done = False
        self.comments = b""
        self.error: UpstreamError | None = None

    @property
    def is_whole(self) -> bool:
        """The answer has all that makes it complete, and no error came with it."""
        return self._watch.is_complete and self.error is None

    def take(self, events: list[Event]) -> bytes:
        """The frames that may go out now.

        `error` is set where one of the events is an error: the frames before it belong to a client
        that has had content already, and to nobody where another rung may still be tried.
        """
        self.comments = b""
        frames = self._withheld
        for event in events:
            if event.kind is EventKind.COMMENT:
                self.comments += sse.comment(event.data.decode("utf-8", "replace"))
            elif event.kind is EventKind.DONE:
                self.is_done = True
                break
            else:
                try:
                    payload, commits = self._watch.see(event.data)
                except UpstreamError as error:
                    self.error = error
                    break
                self._has_content |= commits
                if payload is not None:
                    frames.append(sse.frame(payload))
                    self._withheld_bytes += len(payload)
        if not self._has_content:
            if self._withheld_bytes > _WITHHELD_BYTES_MAX:
                words = f"sent {_WITHHELD_BYTES_MAX} bytes of chunks without any content"
                self.error = UpstreamBroken(f"{self._rung.name} {words}")
            return b""
        self._withheld = []
        return b"".join(frames)

    def finish(self) -> bytes:
        """The last frames of a good end. Raises UpstreamBroken when the answer is not complete."""
        watch = self._watch
        if not watch.has_choices:
            raise UpstreamBroken(f"{self._rung.name} ended its stream without an answer")
        closing = watch.closing_payloads() if self.is_done else []
        if not (self.is_done or watch.is_complete):
            raise UpstreamBroken(f"{self._rung.name} ended its stream before the answer was whole")
        if self._wants_usage and watch.usage is None and (usage := self.usage()) is not None:
            closing.append(watch.usage_payload(usage))
        frames = [*self._withheld, *(sse.frame(payload) for payload in closing), sse.DONE_FRAME]
        return b"".join(frames)

    def usage(self) -> Usage | None:
        """What the upstream reported, else an estimate of what was received, else nothing."""
        watch = self._watch
        if watch.usage is not None or not watch.content_chars:
            return watch.usage
        output_tokens = max(1, watch.content_chars // _CHARS_PER_TOKEN)
        return Usage(self._input_tokens, output_tokens, estimated=True)

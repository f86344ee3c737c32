"""One attempt's answer to the client: withheld until it has content, then passed on as it comes.

The commit is the first content, reasoning, tool or finish event; chunks with only a role wait for
it. All events of one upstream read go out in one write, the stream's end included. While the client
does not read, nothing is read from upstream, and no time limit of the upstream's runs.
"""

from __future__ import annotations

from collections.abc import Callable

from router.backends.base import Backend, ChatAttempt, EmbedAttempt, Event, EventKind, Take
from router.core import escalate, jsontext, rescue, sse
from router.core.chunks import ChunkWatch, produced_chars
from router.core.embeddings import fit
from router.core.rescue import Given
from router.errors import Escalated, UpstreamBroken, UpstreamError
from router.flow.canaries import Canaries
from router.flow.charge import Charge
from router.flow.observe import Record
from router.flow.patience import Patience
from router.flow.progress import Progress
from router.flow.sink import Provenance, Sink
from router.types import Answer, Embeddings, Usage

# Chunks that hold only a role are small and few; more of them is a fault, not an answer.
_WITHHELD_BYTES_MAX = 1 << 20
# How long a stream whose choices are all finished may take for its usage and its [DONE].
_GRACE_S = 2.0


async def answer(
    backend: Backend, attempt: ChatAttempt, charge: Charge, sink: Sink, attempts: int
) -> None:
    """A whole chat answer, of the call's last of so many attempts. Raises Escalated where the
    ladder asks for a better one."""
    call = attempt.call
    with Patience(attempt.rung.name) as patience:
        patience.wait("answer", call.ladder.limits.answer_s)
        whole = await backend.complete_chat(attempt)
    if whole.usage is None:
        charge.used(charge.received(_content_chars(whole.body), 0))
    else:
        charge.used(whole.usage)
        charge.learn(whole.usage, 0, 0)
    if call.ladder.escalate_on:
        _judge(attempt, escalate.of_answer(whole.body), whole)
    cost = charge.call_nanousd(charge.usage)
    await sink.send_answer(
        whole, Provenance(attempt.rung, attempts, charge.clamped_to, cost, charge.is_short)
    )


def _content_chars(answer: bytes) -> int:
    choices = jsontext.read(answer)["choices"]
    return sum(produced_chars(choice["message"]) for choice in choices)


async def embeddings(backend: Backend, attempt: EmbedAttempt, canaries: Canaries) -> Embeddings:
    """A whole embeddings answer, of a rung that is known to share the ladder's vector space."""
    with Patience(attempt.rung.name) as patience:
        patience.wait("answer", attempt.call.ladder.limits.answer_s)
        if not canaries.know(attempt):
            await canaries.ensure(backend, attempt)
        vectors = await backend.embed(attempt)
        return fit(vectors, attempt.call.dimensions, who=attempt.rung.name)


async def stream(
    backend: Backend,
    attempt: ChatAttempt,
    charge: Charge,
    sink: Sink,
    record: Record,
    provenance: Provenance,
    since_start_s: Callable[[], float],
    progress: Progress,
) -> None:
    """A streamed chat answer, to its end. Raises UpstreamError where it breaks."""
    outlet = _Outlet(sink, provenance, attempt)
    spent = progress.spent
    relay = _Relay(attempt, charge, sink, progress.given, spent)
    used: Usage | None = None
    try:
        await _pass_on(backend, attempt, outlet, record, since_start_s, relay, progress)
        relay.learn()
        last = relay.finish()
        used = relay.own_usage()
        await outlet.finish(last, charge.call_nanousd(used))
    finally:
        used = used or relay.own_usage()
        charge.used(used)
        progress.spent = together(spent, used)


async def _pass_on(
    backend: Backend,
    attempt: ChatAttempt,
    outlet: _Outlet,
    record: Record,
    since_start_s: Callable[[], float],
    relay: _Relay,
    progress: Progress,
) -> None:
    """Pass the stream's events on until it is done, or whole and then broken or silent."""
    limits = attempt.call.ladder.limits
    try:
        with Patience(attempt.rung.name) as patience:
            patience.wait("first_token", limits.first_token_s)
            opened = progress.join(await backend.stream_chat(attempt), attempt.rung.name)
            relay.patience = patience
            try:
                while not relay.is_done and (events := await opened.read(relay.take_now)):
                    frames = relay.take(events)
                    if relay.comments:
                        await outlet.sink.comment(relay.comments)
                    if relay.has_moved and (relay.error is None or outlet.sink.is_committed):
                        if record.first_token_s is None:
                            record.first_token_s = since_start_s()
                        if frames and not outlet.write_now(frames):
                            patience.pause()
                            await outlet.write(frames, is_whole=relay.is_whole)
                            progress.let_go(attempt.call)
                        # Once it is whole, only a usage chunk and [DONE] can come.
                        grace_s = _GRACE_S if relay.is_whole else limits.idle_s
                        patience.wait("idle", min(grace_s, limits.idle_s))
                    if relay.error is not None:
                        raise relay.error
                    while relay.is_due and not await relay.keep_ahead():
                        if not await outlet.cut(relay.finish(), relay.nanousd()):
                            return
                    # Thousands of streams wait for their next event: none keeps the last one.
                    del events, frames
            finally:
                opened.close()
    except UpstreamError:
        if not relay.is_whole:
            raise


class _Outlet:
    """Where a stream's frames go: to the client at once, or kept until the answer is whole.

    Kept are the frames of a ladder that commits to complete answers only, and of one that judges
    answers where the first content is all of the answer.
    """

    __slots__ = (
        "_attempt",
        "_has_begun",
        "_is_keeping",
        "_kept",
        "_kept_bytes",
        "_ladder",
        "_provenance",
        "sink",
    )

    def __init__(self, sink: Sink, provenance: Provenance, attempt: ChatAttempt) -> None:
        self.sink = sink
        self._provenance = provenance
        self._attempt = attempt
        self._ladder = attempt.call.ladder
        self._has_begun = False
        self._is_keeping = self._ladder.commit_complete
        self._kept: list[bytes] = []
        self._kept_bytes = 0

    def write_now(self, frames: bytes) -> bool:
        """Whether that needed no wait. The first of an attempt's frames tell whom they are from,
        so they are for `write`."""
        return self._has_begun and self.sink.write_now(frames)

    async def write(self, frames: bytes, *, is_whole: bool) -> None:
        if is_whole and self._ladder.escalate_on and not self.sink.is_committed:
            self._is_keeping = True
        if self._is_keeping:
            self._keep(frames)
        else:
            self._has_begun = True
            await self.sink.write(frames, self._provenance)

    async def finish(self, frames: bytes, nanousd: int) -> None:
        """The last frames of a good end. Raises Escalated where a better answer is asked for."""
        judges = bool(self._ladder.escalate_on) and not self.sink.is_committed
        if self._is_keeping or judges:
            self._keep(frames)
            frames = b"".join(self._kept)
            if judges:
                _judge(self._attempt, escalate.of_stream(frames), frames)
        await self.sink.end(frames, self._priced(nanousd))

    async def cut(self, frames: bytes, nanousd: int) -> bool:
        """Whether the stream goes on, for somebody else than who paid so far."""
        if self._is_keeping:
            return False
        return await self.sink.cut(frames, self._priced(nanousd))

    def _priced(self, nanousd: int) -> Provenance:
        whom = self._provenance
        return Provenance(whom.rung, whom.attempts, whom.clamped_to, nanousd, whom.is_short)

    def _keep(self, frames: bytes) -> None:
        self._kept.append(frames)
        self._kept_bytes += len(frames)
        if self._kept_bytes > self._attempt.answer_bytes_max:
            words = f"answered with more than {self._attempt.answer_bytes_max} bytes"
            raise UpstreamBroken(f"{self._attempt.rung.name} {words}")


def _judge(attempt: ChatAttempt, said: list[escalate.Said], answer: Answer | bytes) -> None:
    """Raises Escalated where the ladder wants a better answer than this one."""
    why = escalate.why(attempt.call.body, said, attempt.call.ladder.escalate_on)
    if why is not None:
        words = f"{attempt.rung.name} answered, but the ladder goes on from such an answer: {why}"
        raise Escalated(words, why=why, answer=answer)


def together(one: Usage | None, other: Usage | None) -> Usage | None:
    """What two attempts of one call used."""
    return rescue.added(one, other) if one is not None and other is not None else one or other


class _Relay:
    """What becomes of one stream's events: frames to send, withheld until there is content."""

    __slots__ = (
        "_charge",
        "_given",
        "_has_content",
        "_is_cut",
        "_rung",
        "_sink",
        "_spent",
        "_wants_usage",
        "_watch",
        "_withheld",
        "_withheld_bytes",
        "comments",
        "error",
        "has_moved",
        "is_done",
        "patience",
    )
    patience: Patience

    def __init__(
        self,
        attempt: ChatAttempt,
        charge: Charge,
        sink: Sink,
        given: Given | None,
        spent: Usage | None,
    ) -> None:
        call, rung = attempt.call, attempt.rung
        self._rung = rung
        self._charge = charge
        self._sink = sink
        self._given = given
        self._spent = spent
        self._wants_usage = call.wants_usage
        self._watch = ChunkWatch(
            who=rung.name,
            call_id=call.id,
            wants_usage=call.wants_usage,
            choices_wanted=call.body.get("n") or 1,
        )
        self._withheld: list[bytes] = []
        self._withheld_bytes = 0
        self._has_content = False
        self._is_cut = False
        self.is_done = False
        self.has_moved = False
        self.comments = b""
        self.error: UpstreamError | None = None

    @property
    def is_whole(self) -> bool:
        """The answer has all that makes it complete, and no error came with it."""
        return self._watch.is_complete and self.error is None

    @property
    def take_now(self) -> Take | None:
        """What may take bytes of the stream before this attempt's task does: once content flows
        and nothing is held back, chunks that are like the last one need no look of the task's."""
        given = self._given
        if self._watch.skeleton is None or not self._has_content or self._withheld:
            return None
        if self._watch.is_complete or not (given is None or given.holds_nothing):
            return None
        return self._pass_now

    def _pass_now(self, data: bytes) -> bool:
        """Pass on bytes of the stream as they are, for a client that takes them and within the
        hold; False where that is not so, or they are not like the last chunk."""
        watch = self._watch
        assert watch.skeleton is not None
        found = watch.skeleton.read(data)
        if found is None:
            return False
        text, chunks = found
        chars = len(text)
        if self._charge.is_due(watch.content_chars + chars, watch.content_chunks + chunks):
            return False
        if not self._sink.write_now(data):
            return False
        watch.took(chars, chunks)
        if self._given is not None:
            self._given.give(text, chunks)
        self.patience.again()
        return True

    def take(self, events: list[Event]) -> bytes:
        """The frames that may go out now.

        `error` is set where one of the events is an error: the frames before it belong to a client
        that has had content already, and to nobody where another rung may still be tried.
        `has_moved` is set where there is content, though it may be held back for what comes next.
        """
        self.comments = b""
        before = len(self._withheld)
        frames = self._withheld
        unmended: bytes | None = None
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
                    if self._watch.is_complete and type(error) is UpstreamBroken:
                        # Only the usage can be missing: as good as cut off there.
                        self.is_done = True
                    else:
                        self.error = error
                    break
                self._has_content |= commits
                unmended = payload if payload is event.data else None
                if payload is not None:
                    frames.append(sse.frame(payload))
                    self._withheld_bytes += len(payload)
                    if self._given is not None:
                        self._given.queue(self._watch.last)
        if not self._has_content:
            if self._withheld_bytes > _WITHHELD_BYTES_MAX:
                words = f"sent {_WITHHELD_BYTES_MAX} bytes of chunks without any content"
                self.error = UpstreamBroken(f"{self._rung.name} {words}")
            return b""
        if unmended is not None and not self.is_done:
            self._watch.learn(unmended)
        self.has_moved = len(frames) > before
        if self.is_done:
            # They go out with the end, in one write.
            return b""
        ready = self._ready(frames)
        self._withheld = frames[ready:]
        return b"".join(frames[:ready])

    def _ready(self, frames: list[bytes]) -> int:
        """How many of the frames may go out: what might begin a stop string waits for more."""
        if self._given is None:
            return len(frames)
        ready = self._given.ready()
        if sum(map(len, frames[ready:])) > _WITHHELD_BYTES_MAX:
            self._given.give_up("too much would have to be held back")
            return len(frames)
        return ready

    def finish(self) -> bytes:
        """The last frames of a good end. Raises UpstreamBroken when the answer is not complete."""
        watch = self._watch
        if not watch.has_choices:
            raise UpstreamBroken(f"{self._rung.name} ended its stream without an answer")
        if not (self.is_done or watch.is_complete or self._is_cut):
            raise UpstreamBroken(f"{self._rung.name} ended its stream before the answer was whole")
        closing = []
        if self._is_cut:
            closing = watch.closing_payloads("length")
        elif self.is_done:
            closing = watch.closing_payloads()
        if self._wants_usage and watch.usage is None and (usage := self.usage()) is not None:
            closing.append(watch.usage_payload(usage))
        frames = [*self._withheld, *(sse.frame(payload) for payload in closing)]
        if self._is_cut:
            frames.append(sse.comment(f"rungway ends the answer: {self._charge.cut_reason}"))
        return b"".join(frames)

    def nanousd(self) -> int:
        """What the call has cost so far."""
        return self._charge.call_nanousd(self.own_usage())

    @property
    def is_due(self) -> bool:
        """Whether the hold has to grow before more of the answer is taken."""
        if self.is_done or self.is_whole:
            return False
        return self._charge.is_due(self._watch.content_chars, self._watch.content_chunks)

    async def keep_ahead(self) -> bool:
        """Let the hold grow; where it cannot, the answer is cut here."""
        watch = self._watch
        self._is_cut = not await self._charge.keep_ahead(watch.content_chars, watch.content_chunks)
        return not self._is_cut

    def learn(self) -> None:
        """The answer came whole: take note of what was reported of it."""
        usage, watch = self._watch.usage, self._watch
        is_all = not (watch.unreported_chars or self._is_cut)
        if usage is not None and self._spent is None and is_all:
            self._charge.learn(usage, watch.content_chars, watch.content_chunks)

    def usage(self) -> Usage | None:
        """What the answer used, the attempts that it goes on from included."""
        return together(self._spent, self.own_usage())

    def own_usage(self) -> Usage | None:
        """What this attempt used: as reported, else as received, else nothing."""
        watch, charge = self._watch, self._charge
        if watch.usage is None:
            if not watch.content_chars:
                return None
            return charge.received(watch.content_chars, watch.content_chunks)
        used = watch.usage
        if watch.unreported_chars:
            # What was reported came too early to be all: at the start, or before a break.
            rest = charge.received(watch.unreported_chars, watch.unreported_chunks)
            used = Usage(used.input_tokens, used.output_tokens + rest.output_tokens, True)
        # Of a continued answer, that of the attempts before is in it (`Seam`).
        return used if self._spent is None else rescue.without(used, self._spent)

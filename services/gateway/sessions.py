"""Open sessions: a long text whose KV is kept by a lease, so that each question only pays for itself.

A session outlives its worker: the text's ids stay here, and when the KV is gone the next question reads the text again
(slower, never wrong). Ids are unguessable and belong to a tenant; another tenant's reads as NOT_FOUND (R29).
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Iterator

from winnow import telemetry
from winnow.errors import Overloaded, UnknownName
from winnow.proto.v1 import internal_pb2, winnow_pb2
from winnow.services.gateway.calls import Emit
from winnow.services.gateway.hops import Hops, Lease
from winnow.services.gateway.prompts import ContextPrompt
from winnow.services.gateway.router import Worker
from winnow.services.gateway.validation import Chosen
from winnow.wire import method_to_proto

MAX_SESSIONS = 1024
log = telemetry.get_logger("sessions")


class Session:
    """One open text. `lease` holds its KV on a worker; `recall` is that of reading it, None = not measured."""

    def __init__(
        self, tenant: str, context: ContextPrompt, prefill: Chosen, idle_timeout_s: float, lease: Lease, recall: float | None
    ) -> None:  # fmt: skip
        self.session_id = secrets.token_urlsafe(18)
        self.tenant = tenant
        self.context = context
        self.prefill = prefill
        self.idle_timeout_s = idle_timeout_s
        self.lease = lease
        self.recall = recall
        self.busy = 0
        self.last_used = time.monotonic()
        self.task: asyncio.Task[None] | None = None

    @property
    def worker(self) -> Worker | None:
        """Where the text's KV is, while it is there."""
        return self.lease.worker if self.lease.error is None else None

    @property
    def idle_left_s(self) -> float:
        if self.busy:
            return self.idle_timeout_s
        return max(0.0, self.last_used + self.idle_timeout_s - time.monotonic())

    def to_proto(self) -> winnow_pb2.Session:
        return winnow_pb2.Session(
            session_id=self.session_id,
            tokens=len(self.context.token_ids),
            prefill=self.prefill.choice.spec,
            idle_left_s=self.idle_left_s,
            recall=self.recall,
        )


class Sessions:
    """The open sessions of a gateway."""

    def __init__(self, hops: Hops) -> None:
        self._hops = hops
        self._open: dict[str, Session] = {}

    async def open(
        self,
        request_id: str,
        tenant: str,
        context: ContextPrompt,
        prefill: Chosen,
        idle_timeout_s: float,
        emit: Emit[winnow_pb2.OpenSessionEvent],
    ) -> None:
        """Read the text into a segment, keep its lease, and emit progress and the session."""
        if len(self._open) >= MAX_SESSIONS:
            raise Overloaded(f"sessions: {MAX_SESSIONS} are open, which is all a gateway keeps; close some", retry_after_ms=5000)

        async def progress(done: int, total: int) -> None:
            event = winnow_pb2.OpenSessionEvent(progress={"stage": "prefill", "done": done, "total": total})
            await emit(event)

        ids = list(context.token_ids)
        request = internal_pb2.PrefillRequest(
            request_id=request_id,
            token_ids=[*ids, ids[-1]],  # prefill leaves the last token to decode; one more makes it read the whole text
            method=method_to_proto(prefill.choice),
            context_tokens=len(ids),
            tenant=tenant,
        )
        lease, result = await self._hops.prefill(request, progress)
        recall = result.recall if result.HasField("recall") else None
        session = Session(tenant, context, prefill, idle_timeout_s, lease, recall)
        session.task = asyncio.create_task(self._keep(session))
        self._open[session.session_id] = session
        handed_over = False
        try:
            await emit(winnow_pb2.OpenSessionEvent(session=session.to_proto()))
            handed_over = True
        finally:
            if not handed_over:  # nobody learnt its id
                self._drop(session)

    @contextlib.contextmanager
    def use(self, session_id: str, tenant: str) -> Iterator[Session]:
        """A session that does not become idle while the block runs. Raises UnknownName."""
        session = self._find(session_id, tenant)
        session.busy += 1
        try:
            yield session
        finally:
            session.busy -= 1
            session.last_used = time.monotonic()

    def of(self, tenant: str) -> list[winnow_pb2.Session]:
        return [s.to_proto() for s in self._open.values() if s.tenant == tenant]

    def close(self, session_id: str, tenant: str) -> None:
        """Let a session's KV go. Raises UnknownName."""
        self._drop(self._find(session_id, tenant))

    def close_all(self) -> None:
        for session in list(self._open.values()):
            self._drop(session)

    def _find(self, session_id: str, tenant: str) -> Session:
        session = self._open.get(session_id)
        if session is None or session.tenant != tenant:
            raise UnknownName("session_id: no such open session; it may have been closed or idle too long; open it again")
        return session

    def _drop(self, session: Session) -> None:
        if self._open.pop(session.session_id, None) is None and session.task is None:
            return
        if session.task is not None:
            session.task.cancel()
            session.task = None
        self._hops.release(session.lease)

    async def _keep(self, session: Session) -> None:
        """Renew the lease until the session was idle for too long."""
        keeper = asyncio.create_task(self._hops.keep(session.lease))
        try:
            while session.idle_left_s > 0:
                await asyncio.sleep(session.idle_left_s)
        finally:
            keeper.cancel()
        log.info("session closed, it was idle", idle_timeout_s=session.idle_timeout_s)
        session.task = None
        self._drop(session)

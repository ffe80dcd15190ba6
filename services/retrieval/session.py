"""The decode engine's side of retrieval: a session in this process, or one gRPC stream to another.

The engine is a plain thread that asks once a layer and waits, so the stream is a synchronous one: a queue feeds it, and the
engine's thread itself waits for the answer. (Measured on 2 busy cores: 0.42 to 0.58 ms a round trip; through an event loop
of our own 0.50 to 0.85.) One watchdog thread ends a stream whose answer is overdue, so the wait itself needs no timer.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from typing import Any

import grpc
import numpy as np
import torch
from torch import Tensor

from winnow.config import GatewayConfig
from winnow.errors import InvalidRequest, WinnowError, WorkerLost
from winnow.proto.v1 import internal_pb2, internal_pb2_grpc
from winnow.services.common.links import Links, channel_credentials, channel_options, error_of
from winnow.services.retrieval.book import IndexBook
from winnow.workers.attention.backend import LayerSpec
from winnow.workers.decode.base import Partial, RetrievalSession

ANSWER_TIMEOUT_S = 5.0  # of one layer; a search takes milliseconds
_WATCH_EVERY_S = 0.1
LOST = "the retrieval worker is lost; the sequence can go on with exact attention"


class SessionOpener:
    """Opens sessions for one process's decode engine.

    Args:
        book: of the retrieval role in this process, if it has one.
    """

    def __init__(
        self, links: Links, limits: GatewayConfig, book: IndexBook | None = None, answer_timeout_s: float = ANSWER_TIMEOUT_S
    ) -> None:
        self._links = links
        self._limits = limits
        self._book = book
        self._answer_timeout_s = answer_timeout_s
        self._channels: dict[str, grpc.Channel] = {}
        self._watchdog = Watchdog()

    def open(self, address: str, index_id: str, sink_tokens: int, recent_tokens: int) -> RetrievalSession:
        """A session over an opened index. Nothing is sent before the first query.

        Args:
            sink_tokens, recent_tokens: as the index was opened with.

        Raises:
            InvalidRequest: no address. DeadlineExceeded: no time is left. ConfigError: no TLS to another machine.
        """
        if self._book is not None and index_id in self._book:
            return self._book.session(index_id)
        if not address:
            raise InvalidRequest("retrieval_address: needed to reach the index, got none")
        stub = internal_pb2_grpc.RetrievalStub(self._channel(address))
        return GrpcSession(
            stub, index_id, sink_tokens, recent_tokens, self._watchdog, self._answer_timeout_s, self._links.options()
        )

    def close(self) -> None:
        self._watchdog.stop()
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()

    def _channel(self, address: str) -> grpc.Channel:
        channel = self._channels.get(address)
        if channel is None:
            credentials, options = channel_credentials(address, self._limits), channel_options(self._limits)
            if credentials is None:
                channel = grpc.insecure_channel(address, options=options)
            else:
                channel = grpc.secure_channel(address, credentials, options=options)
            self._channels[address] = channel
        return channel


class GrpcSession:
    """A `RetrievalSession` over one Attend stream. Used by one thread at a time; `close` from any."""

    def __init__(
        self, stub: internal_pb2_grpc.RetrievalStub, index_id: str, sink_tokens: int, recent_tokens: int,
        watchdog: Watchdog, timeout_s: float, options: dict[str, Any],
    ) -> None:  # fmt: skip
        self._index_id = index_id
        self._sink_tokens, self._recent_tokens = sink_tokens, recent_tokens
        self._requests: queue.SimpleQueue[internal_pb2.AttendRequest | None] = queue.SimpleQueue()
        self._call: Any = stub.Attend(iter(self._requests.get, None), **options)
        self._timeout_s = timeout_s
        self._watchdog = watchdog
        self.overdue_at = float("inf")  # read by the watchdog: when the wait that is under way is too long
        watchdog.add(self)

    @property
    def sink_tokens(self) -> int:
        return self._sink_tokens

    @property
    def recent_tokens(self) -> int:
        return self._recent_tokens

    def submit(self, layer: LayerSpec, q: Tensor, top_k: int) -> None:
        """See RetrievalSession. Raises WorkerLost after `close`."""
        if self._call is None:
            raise WorkerLost(LOST)
        rows = q.detach().to("cpu", torch.float32).contiguous().numpy()
        self._requests.put(
            internal_pb2.AttendRequest(
                index_id=self._index_id, layer=layer.idx, q=rows.tobytes(), top_k=top_k, scale=layer.scale, softcap=layer.softcap
            )
        )

    def collect(self, layer: LayerSpec) -> Partial:
        """See RetrievalSession: answers come in the order of the queries.

        Raises:
            WorkerLost: the service, its index or the way to it is gone, or the answer is overdue.
            InvalidRequest: the service refused the query itself.
        """
        if self._call is None:
            raise WorkerLost(LOST)
        self.overdue_at = time.monotonic() + self._timeout_s
        try:
            reply = next(self._call)
        except StopIteration:
            raise WorkerLost(LOST) from None
        except grpc.RpcError as error:
            found: WinnowError = error_of(error)
            raise (found if isinstance(found, InvalidRequest) else WorkerLost(LOST)) from None
        finally:
            self.overdue_at = float("inf")
        shape = (layer.n_q_heads, layer.head_size)
        if reply.layer != layer.idx or len(reply.out) != 4 * shape[0] * shape[1] or len(reply.lse) != 4 * shape[0]:
            raise WorkerLost("the retrieval worker answered another question; the sequence can go on with exact attention")
        out = torch.from_numpy(np.frombuffer(reply.out, "<f4").reshape(shape).astype(np.float32))
        lse = torch.from_numpy(np.frombuffer(reply.lse, "<f4").astype(np.float32))
        return Partial(out, lse, reply.keys_read, reply.keys_scanned)

    def cancel(self) -> None:
        """End the stream; a `collect` that waits raises WorkerLost."""
        call = self._call
        if call is not None:
            call.cancel()

    def close(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            self._watchdog.remove(self)
            self._requests.put(None)  # lets the thread that feeds the stream end
            call.cancel()


class Watchdog:
    """One thread that cancels sessions whose answer is overdue. It runs only while there are sessions."""

    def __init__(self) -> None:
        self._sessions: set[GrpcSession] = set()
        self._lock = threading.Condition()
        self._thread: threading.Thread | None = None

    def add(self, session: GrpcSession) -> None:
        with self._lock:
            self._sessions.add(session)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="winnow-attend-watchdog", daemon=True)
                self._thread.start()

    def remove(self, session: GrpcSession) -> None:
        with self._lock:
            self._sessions.discard(session)
            self._lock.notify_all()

    def stop(self) -> None:
        """End every session and the thread."""
        with self._lock:
            sessions, thread = list(self._sessions), self._thread
            self._sessions.clear()
            self._lock.notify_all()
        for session in sessions:
            session.cancel()
        if thread is not None:
            thread.join(timeout=2.0)

    def _run(self) -> None:
        with self._lock:
            while self._sessions:
                now = time.monotonic()
                for session in self._sessions:
                    if session.overdue_at < now:
                        with contextlib.suppress(ValueError):  # grpc raises it for a channel that was closed meanwhile
                            session.cancel()
                self._lock.wait(_WATCH_EVERY_S)
            self._thread = None

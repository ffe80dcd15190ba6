"""Draft service: the draft model says which tokens of a prompt the served model needs to see."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc.aio
import torch

from winnow.errors import Cancelled, ContextTooLong, InvalidRequest, Overloaded
from winnow.proto.v1 import common_pb2, internal_pb2, internal_pb2_grpc
from winnow.services.bridge import IsCancelled, OnProgress, in_thread
from winnow.services.prefill.servicer import check_tokens, note_request
from winnow.services.worker import Gate
from winnow.wire import method_from_proto
from winnow.workers.draft.base import DraftContext, PromptReducer, draft_scorers
from winnow.workers.model.loader import LoadedModel


class DraftServicer(internal_pb2_grpc.DraftServicer):
    """One prompt at a time in one thread; `max_waiting` more may wait."""

    def __init__(self, draft: LoadedModel, gate: Gate, max_waiting: int = 64) -> None:
        self._draft = draft
        self._gate = gate
        self._max_waiting = max_waiting
        self._pool = ThreadPoolExecutor(1, "winnow-draft")
        self.n_jobs = 0  # running and waiting

    async def Score(self, request: internal_pb2.ScoreRequest, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """See internal.proto. Cancelling stops the draft at its next forward pass.

        Raises:
            UnknownName, InvalidRequest: the scorer or its parameters; no tokens, or ids outside the vocabulary.
            ContextTooLong: the prompt exceeds the draft model's context. Overloaded: too many wait already.
        """
        note_request(request.request_id)
        if not request.scorer.name:
            raise InvalidRequest(f"scorer.name: needed (known: {', '.join(draft_scorers.names())})")
        choice = method_from_proto(request.scorer)
        scorer = draft_scorers.create(choice.name, dict(choice.params))
        spec = self._draft.spec
        if not request.token_ids:
            raise InvalidRequest("token_ids: a prompt needs at least one token, got none")
        check_tokens("token_ids", request.token_ids, spec.vocab_size)
        if len(request.token_ids) > spec.max_context:
            raise ContextTooLong(
                f"token_ids: {len(request.token_ids)} tokens exceed the draft model's context of {spec.max_context}; "
                "leave the reducer out, or shorten the prompt"
            )
        if self.n_jobs > self._max_waiting:
            raise Overloaded(f"draft: {self.n_jobs} prompts wait already; retry later")
        token_ids = torch.tensor(request.token_ids, dtype=torch.int64)
        started = time.monotonic()

        def work(on_progress: OnProgress, is_cancelled: IsCancelled) -> list[int]:
            return keep(scorer, self._draft, token_ids, on_progress, is_cancelled)

        async def report(done: int, total: int) -> None:
            await context.write(internal_pb2.ScoreEvent(progress=common_pb2.Progress(stage="draft", done=done, total=total)))

        with self._gate.work():
            self.n_jobs += 1
            try:
                kept = await in_thread(self._pool, work, report)
            finally:
                self.n_jobs -= 1
            result = internal_pb2.ScoreResult(kept=kept, work_s=time.monotonic() - started)
            await context.write(internal_pb2.ScoreEvent(result=result))

    def stop(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def keep(
    scorer: PromptReducer, draft: LoadedModel, token_ids: torch.Tensor, on_progress: OnProgress, is_cancelled: IsCancelled
) -> list[int]:
    """Indices to keep. Raises Cancelled once `is_cancelled` says so."""

    def check_cancelled() -> None:
        if is_cancelled():
            raise Cancelled("the request was cancelled")

    check_cancelled()
    kept = scorer.keep(token_ids, DraftContext(draft, on_progress, check_cancelled))
    return [int(i) for i in kept.tolist()]

"""What the prefill engine is asked to do and what it answers: jobs and events."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from winnow.errors import InvalidRequest
from winnow.index.store import Lease
from winnow.types import Document, MethodChoice, Ranking, SegmentHandle
from winnow.workers.job import Failed, JobHandle
from winnow.workers.prefill.base import PrefillMethod
from winnow.workers.prefill.break_even import dense_share
from winnow.workers.ranking.base import Ranker


@dataclass(frozen=True)
class PrefillJob:
    """Compute the KV of `token_ids[:-1]`; the decode engine feeds the last token.

    Attributes:
        token_ids: the whole prompt, at least one token.
        tail_tokens: tokens that will be generated after the prompt; the segment gets room for them.
        method: an instance, a name with parameters, or None for the engine's default.
        no_cache: neither read nor write the prefix cache.
        context_tokens: the first n tokens are a context of their own: a sparse method plans over them alone and the rest is
            dense, so that the context's KV serves other questions. 0 = none: all but `prefill.dense_tail_tokens` is planned.
        tenant: part of every cache key.
        query_sample: keep this many query vectors of each layer and head in the segment, for index training.
    """

    request_id: str
    token_ids: Sequence[int]
    tail_tokens: int = 0
    method: PrefillMethod | MethodChoice | None = None
    no_cache: bool = False
    context_tokens: int = 0
    tenant: str = ""
    query_sample: int = 0

    def validate(self) -> PrefillJob:
        """Return self. Raises InvalidRequest naming the field that is out of range."""
        if not self.token_ids:
            raise InvalidRequest("token_ids: a prompt needs at least one token, got none")
        for name in ("tail_tokens", "context_tokens", "query_sample"):
            if getattr(self, name) < 0:
                raise InvalidRequest(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.context_tokens > len(self.token_ids):
            raise InvalidRequest(f"context_tokens must be at most the prompt's {len(self.token_ids)}, got {self.context_tokens}")
        return self


@dataclass(frozen=True)
class RankJob:
    """Order documents for a query. `ranker` is an instance, or a name with parameters."""

    request_id: str
    query: str
    documents: Sequence[Document]
    ranker: Ranker | MethodChoice
    tenant: str = ""


@dataclass(frozen=True)
class Progress:
    """Tokens of a prompt whose KV is there, or documents that are scored, out of all."""

    done: int
    total: int


@dataclass(frozen=True)
class PrefillResult:
    """The prompt's KV is sealed and leased to the caller, who renews and releases it in the store.

    Attributes:
        segment: names the KV; its lease belongs to the receiver of this event.
        lease: the store's own object, for callers in the same process.
        cached_tokens: tokens taken from the prefix cache.
        density: kept (query, key) pairs / causal pairs over layers, query heads and computed rows; 1.0 = dense, and 1.0
            where nothing was computed.
        queue_s, work_s: seconds from submit to the first step, and from there to the end (other jobs' steps included).
        recall: share of attention mass on the keys that a sparse method read, mean over layers, query heads and computed
            rows, estimated on sampled rows (dense parts count as 1); None = not measured, see `winnow.types.Usage`.
        passes: a sparse method's passes through a layer, by the reason for running them sparse or dense; see `BreakEven`.
            Empty for a dense method, and where the predictor is off.
    """

    segment: SegmentHandle
    lease: Lease
    cached_tokens: int
    density: float
    queue_s: float
    work_s: float
    recall: float | None = None
    passes: Mapping[str, int] = field(default_factory=dict)

    @property
    def dense_share(self) -> float:
        """Share of the passes that ran dense because sparse would not have paid; 0 where there were none."""
        return dense_share(self.passes)


@dataclass(frozen=True)
class RankResult:
    """The finished ranking."""

    ranking: Ranking
    queue_s: float
    work_s: float


Event = Progress | PrefillResult | RankResult | Failed
OnEvent = Callable[[Event], None]
Handle = JobHandle[Event]

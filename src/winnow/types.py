"""The nouns that cross module borders: requests, sampling, rankings, handles. Plain frozen dataclasses, no torch, no gRPC."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from winnow.errors import InvalidRequest


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it. 0 <= temperature <= 10.
        top_p: keep the smallest set of tokens whose probability reaches it. 0 < top_p <= 1.
        top_k: keep the k most likely tokens; 0 keeps all.
        min_p: drop tokens less likely than min_p times the most likely one. 0 <= min_p <= 1.
        seed: of this request's own generator; -1 draws one.
        max_tokens: most new tokens, >= 1.
        stop: strings that end the text; they are not part of it. At most 16, each of 1 to 256 characters.
        logprobs: also report the log-probability of this many most likely tokens; 0 reports none. At most 20.
        ignore_eos: go on after the end-of-sequence token (benchmarks).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = -1
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    logprobs: int = 0
    ignore_eos: bool = False

    def validate(self) -> Sampling:
        """Return self.

        Raises:
            InvalidRequest: a field out of its range; the message names it.
        """
        _between("sampling.temperature", self.temperature, 0.0, 10.0)
        _between("sampling.top_p", self.top_p, 0.0, 1.0, low_open=True)
        _between("sampling.min_p", self.min_p, 0.0, 1.0)
        _between("sampling.top_k", self.top_k, 0, 1 << 20)
        _between("sampling.seed", self.seed, -1, (1 << 63) - 1)
        _between("sampling.max_tokens", self.max_tokens, 1, 1 << 20)
        _between("sampling.logprobs", self.logprobs, 0, 20)
        if len(self.stop) > 16:
            raise InvalidRequest(f"sampling.stop: at most 16 strings, got {len(self.stop)}")
        for text in self.stop:
            _between("sampling.stop: length of each string", len(text), 1, 256)
        return self


def _between(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    inside = (low < value if low_open else low <= value) and value <= high
    if math.isnan(value) or not inside:
        raise InvalidRequest(f"{name} must be in {'(' if low_open else '['}{low}, {high}], got {value}")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Document:
    """A text to be ranked. `doc_id` is unique within one request."""

    doc_id: str
    text: str


@dataclass(frozen=True)
class RankedDocument:
    """One line of a ranking.

    Attributes:
        score: higher is better; raw, comparable across queries where the ranker says so; never NaN.
        rank: from 1.
        truncated: the document did not fit and was cut from its end; the frame around it was kept.
    """

    doc_id: str
    score: float
    rank: int
    truncated: bool = False


@dataclass(frozen=True)
class Ranking:
    """Every document of a request exactly once, best first; ties keep the order of the request."""

    items: tuple[RankedDocument, ...]
    method: str
    seconds: float = 0.0
    fallback_used: str = ""


@dataclass(frozen=True)
class Usage:
    """What one generation cost and read.

    Attributes:
        prompt_tokens: tokens of the prompt as sent to the model (after a prompt reducer, if any).
        cached_tokens: of these, taken from the prefix cache.
        completion_tokens: tokens generated.
        reduced_from_tokens: the prompt's length before the prompt reducer; 0 = no reducer.
        ttft_s: seconds from admission to the first token.
        decode_s: seconds from the first to the last token.
        prefill_density: kept (query, key) pairs / causal pairs over layers, query heads and the rows of `computed_tokens`;
            1.0 = dense, and 1.0 where nothing was computed. Cached tokens are no part of it, nor of `prefill_recall`: what a
            sparse method made of their KV is as approximate as before.
        keys_read_share: mean over decode steps, layers and heads of keys read / keys cached; 1.0 = dense.
        fallback_used: the method that stepped in, e.g. "decode: dense (retrieval lost)"; "" = none.
        prefill_recall: share of the attention mass on the keys that a sparse prefill read, 0 to 1: mean over layers, query
            heads and the rows of `computed_tokens`, where what ran dense counts as 1. An unbiased estimate from sampled rows of
            every layer, against exact attention over the inputs that the layer really saw. None = not measured: a dense or
            wholly cached prefill, a method that estimates what it does not read, or a server that does not measure.
        prefill_dense_share: share of a sparse method's passes through a layer that ran dense because sparse was predicted not
            to pay, 0 to 1; of what was computed, as the two above.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reduced_from_tokens: int = 0
    ttft_s: float = 0.0
    decode_s: float = 0.0
    prefill_density: float = 1.0
    keys_read_share: float = 1.0
    fallback_used: str = ""
    prefill_recall: float | None = None
    prefill_dense_share: float = 0.0

    @property
    def computed_tokens(self) -> int:
        """Tokens that the prefill computed: the prompt's, but for the cached ones and the last, which is the decode's first."""
        return max(0, self.prompt_tokens - 1 - self.cached_tokens)


@dataclass(frozen=True)
class TokenLogprob:
    """One of the most likely tokens at a position, natural log."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed generation.

    Attributes:
        text: complete characters only; may be empty while a multi-byte character is still incomplete.
        token_ids: the tokens this piece came from.
        logprobs: per token, the most likely tokens, if they were asked for.
        finish_reason: "" until the last piece, then "stop", "length" or "eos".
        usage: only in the last piece.
        stage, done, total: progress before the first token, e.g. ("prefill", 2048, 6000) tokens.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()
    finish_reason: str = ""
    usage: Usage | None = None
    stage: str = ""
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class Generation:
    """A finished generation."""

    text: str
    finish_reason: str
    usage: Usage
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()


@dataclass(frozen=True)
class Fingerprint:
    """What two parts must agree on before they work together (R17).

    Attributes:
        protocol: version of the internal protocol.
        model: digest of config, weights and tokenizer.
        kv_layout: digest of layers, KV heads, head sizes, dtype and layout version.
        dtype: "fp32", "fp16" or "bf16".
        tensor_parallel: devices a head group is split over.
        methods: sorted "name@version" of the methods this part can run.
    """

    protocol: int
    model: str
    kv_layout: str
    dtype: str
    tensor_parallel: int = 1
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class WorkerInfo:
    """A worker as the registry knows it.

    Attributes:
        worker_id: stable name of the place, e.g. "prefill-0"; a restarted worker keeps it.
        epoch: grows with every start of that worker; entries of an older epoch are never used (R14).
        roles: the gRPC roles this process hosts, e.g. ("prefill", "decode").
        address: host:port.
        host_id: equal for processes that can map each other's shared memory.
        metrics_address: host:port of its Prometheus endpoint, "" = none.
    """

    worker_id: str
    epoch: int
    roles: tuple[str, ...]
    address: str
    host_id: str
    fingerprint: Fingerprint
    pid: int = 0
    metrics_address: str = ""


@dataclass(frozen=True)
class SegmentHandle:
    """Names a KV segment; the bytes never ride along.

    Attributes:
        segment_id: unique, chosen by the owner.
        owner: worker_id of the owner of the bytes, who decides what is true.
        owner_epoch: the owner's epoch; a handle of another epoch is stale.
        host_id: where the bytes are mapped.
        location: file name inside the owner's shared-memory folder ("" = held inside the owner's process only).
        n_tokens: tokens sealed (the prompt part).
        capacity: tokens that fit, prompt and tail.
        kv_layout: see Fingerprint.
        checksum: of the sealed bytes, hex.
        fencing: token of the lease under which the tail may be written; grows with every grant.
    """

    segment_id: str
    owner: str
    owner_epoch: int
    host_id: str
    location: str
    n_tokens: int
    capacity: int
    kv_layout: str
    checksum: str = ""
    fencing: int = 0


@dataclass(frozen=True)
class MethodChoice:
    """A method by name with its parameters as text, as they travel on the wire."""

    name: str
    params: dict[str, str] = field(default_factory=dict)

    @property
    def spec(self) -> str:
        """Canonical text, `name` or `name:key=value,...` with sorted keys."""
        tail = ",".join(f"{k}={v}" for k, v in sorted(self.params.items()))
        return f"{self.name}:{tail}" if tail else self.name

from winnow.proto.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HelloRequest(_message.Message):
    __slots__ = ("expect",)
    EXPECT_FIELD_NUMBER: _ClassVar[int]
    expect: _common_pb2.Fingerprint
    def __init__(self, expect: _Optional[_Union[_common_pb2.Fingerprint, _Mapping]] = ...) -> None: ...

class HelloReply(_message.Message):
    __slots__ = ("info",)
    INFO_FIELD_NUMBER: _ClassVar[int]
    info: _common_pb2.WorkerInfo
    def __init__(self, info: _Optional[_Union[_common_pb2.WorkerInfo, _Mapping]] = ...) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LoadReply(_message.Message):
    __slots__ = ("running", "waiting", "kv_bytes", "kv_budget_bytes", "segments")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    kv_bytes: int
    kv_budget_bytes: int
    segments: int
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., kv_budget_bytes: _Optional[int] = ..., segments: _Optional[int] = ...) -> None: ...

class SegmentHandle(_message.Message):
    __slots__ = ("segment_id", "owner", "owner_epoch", "host_id", "location", "n_tokens", "capacity", "kv_layout", "checksum", "fencing")
    SEGMENT_ID_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    OWNER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    LOCATION_FIELD_NUMBER: _ClassVar[int]
    N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    KV_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    FENCING_FIELD_NUMBER: _ClassVar[int]
    segment_id: str
    owner: str
    owner_epoch: int
    host_id: str
    location: str
    n_tokens: int
    capacity: int
    kv_layout: str
    checksum: str
    fencing: int
    def __init__(self, segment_id: _Optional[str] = ..., owner: _Optional[str] = ..., owner_epoch: _Optional[int] = ..., host_id: _Optional[str] = ..., location: _Optional[str] = ..., n_tokens: _Optional[int] = ..., capacity: _Optional[int] = ..., kv_layout: _Optional[str] = ..., checksum: _Optional[str] = ..., fencing: _Optional[int] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("request_id", "token_ids", "tail_tokens", "method", "no_cache", "context_tokens", "tenant", "query_sample")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TAIL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    NO_CACHE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    QUERY_SAMPLE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    tail_tokens: int
    method: _common_pb2.Method
    no_cache: bool
    context_tokens: int
    tenant: str
    query_sample: int
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., tail_tokens: _Optional[int] = ..., method: _Optional[_Union[_common_pb2.Method, _Mapping]] = ..., no_cache: bool = ..., context_tokens: _Optional[int] = ..., tenant: _Optional[str] = ..., query_sample: _Optional[int] = ...) -> None: ...

class PrefillEvent(_message.Message):
    __slots__ = ("progress", "result")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    progress: _common_pb2.Progress
    result: PrefillResult
    def __init__(self, progress: _Optional[_Union[_common_pb2.Progress, _Mapping]] = ..., result: _Optional[_Union[PrefillResult, _Mapping]] = ...) -> None: ...

class PrefillResult(_message.Message):
    __slots__ = ("segment", "cached_tokens", "density", "queue_s", "work_s", "recall", "dense_share")
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DENSITY_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    WORK_S_FIELD_NUMBER: _ClassVar[int]
    RECALL_FIELD_NUMBER: _ClassVar[int]
    DENSE_SHARE_FIELD_NUMBER: _ClassVar[int]
    segment: SegmentHandle
    cached_tokens: int
    density: float
    queue_s: float
    work_s: float
    recall: float
    dense_share: float
    def __init__(self, segment: _Optional[_Union[SegmentHandle, _Mapping]] = ..., cached_tokens: _Optional[int] = ..., density: _Optional[float] = ..., queue_s: _Optional[float] = ..., work_s: _Optional[float] = ..., recall: _Optional[float] = ..., dense_share: _Optional[float] = ...) -> None: ...

class RankTask(_message.Message):
    __slots__ = ("request_id", "query", "documents", "ranker", "tenant")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    QUERY_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    RANKER_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    query: str
    documents: _containers.RepeatedCompositeFieldContainer[_common_pb2.Document]
    ranker: _common_pb2.Method
    tenant: str
    def __init__(self, request_id: _Optional[str] = ..., query: _Optional[str] = ..., documents: _Optional[_Iterable[_Union[_common_pb2.Document, _Mapping]]] = ..., ranker: _Optional[_Union[_common_pb2.Method, _Mapping]] = ..., tenant: _Optional[str] = ...) -> None: ...

class RankTaskEvent(_message.Message):
    __slots__ = ("progress", "ranking")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    RANKING_FIELD_NUMBER: _ClassVar[int]
    progress: _common_pb2.Progress
    ranking: _common_pb2.Ranking
    def __init__(self, progress: _Optional[_Union[_common_pb2.Progress, _Mapping]] = ..., ranking: _Optional[_Union[_common_pb2.Ranking, _Mapping]] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("segment",)
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    segment: SegmentHandle
    def __init__(self, segment: _Optional[_Union[SegmentHandle, _Mapping]] = ...) -> None: ...

class SegmentChunk(_message.Message):
    __slots__ = ("header", "offset", "data", "checksum", "last")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    header: bytes
    offset: int
    data: bytes
    checksum: int
    last: bool
    def __init__(self, header: _Optional[bytes] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ..., checksum: _Optional[int] = ..., last: bool = ...) -> None: ...

class LeaseRequest(_message.Message):
    __slots__ = ("segment", "ttl_s")
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    segment: SegmentHandle
    ttl_s: float
    def __init__(self, segment: _Optional[_Union[SegmentHandle, _Mapping]] = ..., ttl_s: _Optional[float] = ...) -> None: ...

class LeaseReply(_message.Message):
    __slots__ = ("ttl_s",)
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    ttl_s: float
    def __init__(self, ttl_s: _Optional[float] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("segment", "tail_token_ids")
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    TAIL_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    segment: SegmentHandle
    tail_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, segment: _Optional[_Union[SegmentHandle, _Mapping]] = ..., tail_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ReleaseReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OpenIndexRequest(_message.Message):
    __slots__ = ("request_id", "segment", "owner_address", "index", "sink_tokens", "recent_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    OWNER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SINK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RECENT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    segment: SegmentHandle
    owner_address: str
    index: str
    sink_tokens: int
    recent_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., segment: _Optional[_Union[SegmentHandle, _Mapping]] = ..., owner_address: _Optional[str] = ..., index: _Optional[str] = ..., sink_tokens: _Optional[int] = ..., recent_tokens: _Optional[int] = ...) -> None: ...

class OpenIndexEvent(_message.Message):
    __slots__ = ("progress", "result")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    progress: _common_pb2.Progress
    result: OpenIndexResult
    def __init__(self, progress: _Optional[_Union[_common_pb2.Progress, _Mapping]] = ..., result: _Optional[_Union[OpenIndexResult, _Mapping]] = ...) -> None: ...

class OpenIndexResult(_message.Message):
    __slots__ = ("index_id", "index", "keys", "build_s")
    INDEX_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    BUILD_S_FIELD_NUMBER: _ClassVar[int]
    index_id: str
    index: str
    keys: int
    build_s: float
    def __init__(self, index_id: _Optional[str] = ..., index: _Optional[str] = ..., keys: _Optional[int] = ..., build_s: _Optional[float] = ...) -> None: ...

class AttendRequest(_message.Message):
    __slots__ = ("index_id", "layer", "q", "top_k", "scale", "softcap")
    INDEX_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    Q_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    SOFTCAP_FIELD_NUMBER: _ClassVar[int]
    index_id: str
    layer: int
    q: bytes
    top_k: int
    scale: float
    softcap: float
    def __init__(self, index_id: _Optional[str] = ..., layer: _Optional[int] = ..., q: _Optional[bytes] = ..., top_k: _Optional[int] = ..., scale: _Optional[float] = ..., softcap: _Optional[float] = ...) -> None: ...

class AttendReply(_message.Message):
    __slots__ = ("layer", "out", "lse", "keys_scanned", "keys_read")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    OUT_FIELD_NUMBER: _ClassVar[int]
    LSE_FIELD_NUMBER: _ClassVar[int]
    KEYS_SCANNED_FIELD_NUMBER: _ClassVar[int]
    KEYS_READ_FIELD_NUMBER: _ClassVar[int]
    layer: int
    out: bytes
    lse: bytes
    keys_scanned: int
    keys_read: int
    def __init__(self, layer: _Optional[int] = ..., out: _Optional[bytes] = ..., lse: _Optional[bytes] = ..., keys_scanned: _Optional[int] = ..., keys_read: _Optional[int] = ...) -> None: ...

class CloseIndexRequest(_message.Message):
    __slots__ = ("index_id",)
    INDEX_ID_FIELD_NUMBER: _ClassVar[int]
    index_id: str
    def __init__(self, index_id: _Optional[str] = ...) -> None: ...

class CloseIndexReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("request_id", "token_ids", "scorer")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SCORER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    scorer: _common_pb2.Method
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., scorer: _Optional[_Union[_common_pb2.Method, _Mapping]] = ...) -> None: ...

class ScoreEvent(_message.Message):
    __slots__ = ("progress", "result")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    progress: _common_pb2.Progress
    result: ScoreResult
    def __init__(self, progress: _Optional[_Union[_common_pb2.Progress, _Mapping]] = ..., result: _Optional[_Union[ScoreResult, _Mapping]] = ...) -> None: ...

class ScoreResult(_message.Message):
    __slots__ = ("kept", "work_s")
    KEPT_FIELD_NUMBER: _ClassVar[int]
    WORK_S_FIELD_NUMBER: _ClassVar[int]
    kept: _containers.RepeatedScalarFieldContainer[int]
    work_s: float
    def __init__(self, kept: _Optional[_Iterable[int]] = ..., work_s: _Optional[float] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("request_id", "segment", "owner_address", "last_token_id", "sampling", "method", "retrieval_address", "index_id", "strict", "eos_token_ids")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    OWNER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LAST_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    RETRIEVAL_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INDEX_ID_FIELD_NUMBER: _ClassVar[int]
    STRICT_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    segment: SegmentHandle
    owner_address: str
    last_token_id: int
    sampling: _common_pb2.Sampling
    method: _common_pb2.Method
    retrieval_address: str
    index_id: str
    strict: bool
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request_id: _Optional[str] = ..., segment: _Optional[_Union[SegmentHandle, _Mapping]] = ..., owner_address: _Optional[str] = ..., last_token_id: _Optional[int] = ..., sampling: _Optional[_Union[_common_pb2.Sampling, _Mapping]] = ..., method: _Optional[_Union[_common_pb2.Method, _Mapping]] = ..., retrieval_address: _Optional[str] = ..., index_id: _Optional[str] = ..., strict: bool = ..., eos_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class DecodeEvent(_message.Message):
    __slots__ = ("sequence", "token_ids", "logprobs", "finish_reason", "keys_read_share", "fallback_used")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    KEYS_READ_SHARE_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_USED_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[DecodeLogprobs]
    finish_reason: str
    keys_read_share: float
    fallback_used: str
    def __init__(self, sequence: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[DecodeLogprobs, _Mapping]]] = ..., finish_reason: _Optional[str] = ..., keys_read_share: _Optional[float] = ..., fallback_used: _Optional[str] = ...) -> None: ...

class DecodeLogprobs(_message.Message):
    __slots__ = ("token_ids", "logprobs")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

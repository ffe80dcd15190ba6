"""An index over one segment, and attention over what it finds. Used in process, and by the Retrieval service.

Per layer and KV head one index over the sealed keys between sink and recent tokens; the query heads of a group search the
same index, each for itself (one averaged query per group costs quality). K.q comes with the search, so only V is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import numpy as np
import torch
from torch import Tensor

from winnow.errors import Cancelled, InvalidRequest, WorkerLost
from winnow.index.base import KeyIndex
from winnow.index.segment import KVSegment
from winnow.index.spec import make_index, resolve, set_threads
from winnow.workers.attention.backend import LayerSpec
from winnow.workers.decode.base import Partial

_CHUNK_KEYS = 16384  # keys turned to float32 at a time on a device

Progress = Callable[[int, int], None]


class SegmentIndex:
    """Indexes of all layers of a segment. Built by the constructor; then `attend` may be called by one thread at a time.

    Args:
        segment: sealed; its bytes stay mapped while this object lives, also after the owner unlinked the file.
        spec: index spec; "flat" keeps float32 keys of a layer side by side and scores all heads in place, which beats a
            FAISS call for each head (see `_score`).
        sink_tokens, recent_tokens: sealed tokens at either end that are not indexed.
        layers: layers to index; None = all. Leave out those with a sliding window.
        threads: that build; FAISS releases the interpreter lock.
        on_progress: called as (heads done, heads in all) by the constructing thread.
        is_cancelled: asked between heads.

    Attributes:
        spec: what was built, "auto" resolved.
        n_keys: keys per KV head.

    Raises:
        UnknownName, InvalidRequest: from the spec.
        Cancelled: is_cancelled said so.
    """

    def __init__(
        self, segment: KVSegment, spec: str, sink_tokens: int, recent_tokens: int, on_progress: Progress | None = None, *,
        layers: Collection[int] | None = None, threads: int = 1, is_cancelled: Callable[[], bool] | None = None,
    ) -> None:  # fmt: skip
        if sink_tokens < 0 or recent_tokens < 0:
            raise InvalidRequest(f"sink_tokens and recent_tokens must be >= 0, got {sink_tokens} and {recent_tokens}")
        self.sink_tokens, self.recent_tokens = sink_tokens, recent_tokens
        self._first = min(sink_tokens, segment.n_tokens)
        self.n_keys = max(0, segment.n_tokens - recent_tokens - self._first)
        self.spec = resolve(spec, self.n_keys)
        make_index(spec, self.n_keys)
        n = self.n_keys
        kv = segment.kv[:, :, :, self._first : self._first + n]
        self._k: list[Tensor] = [layer[0] for layer in kv.unbind(0)]  # [Hkv, n, D], views
        # All value rows of a layer as one table [Hkv capacity, D], and where each head's searched rows start in it.
        self._v: list[Tensor] = [segment.v(layer).view(-1, segment.layout.head_size) for layer in range(segment.layout.n_layers)]
        heads = torch.arange(segment.layout.n_kv_heads, device=segment.device)
        self._row_base = (heads * segment.capacity + self._first).view(-1, 1, 1)
        self._flat: dict[int, list[Tensor]] = {}  # float32; layer -> per KV head [n, D]
        self._indexes: dict[int, list[KeyIndex]] = {}
        wanted = sorted(range(segment.layout.n_layers) if layers is None else layers)
        if n:
            self._build(segment, wanted, threads, on_progress, is_cancelled)

    def _build(
        self, segment: KVSegment, layers: list[int], threads: int, on_progress: Progress | None,
        is_cancelled: Callable[[], bool] | None,
    ) -> None:  # fmt: skip
        n_heads = segment.layout.n_kv_heads
        total = len(layers) * n_heads
        if self.spec == "flat":
            for done, layer in enumerate(layers, 1):
                if is_cancelled is not None and is_cancelled():
                    raise Cancelled("building the index was cancelled")
                if segment.device.type == "cpu":
                    self._flat[layer] = [head.float() for head in self._k[layer]]  # no copy where keys are float32
                if on_progress is not None:
                    on_progress(done * n_heads, total)
            return
        with ThreadPoolExecutor(max(1, threads), initializer=set_threads, initargs=(1,)) as pool:
            places = [(layer, head) for layer in layers for head in range(n_heads)]
            jobs = {pool.submit(self._build_head, segment, *place): place for place in places}
            waiting = set(jobs)
            while waiting:
                done_now, waiting = wait(waiting, timeout=0.1, return_when=FIRST_EXCEPTION)
                failed = next((job for job in done_now if job.exception() is not None), None)
                stop = is_cancelled is not None and is_cancelled()
                if failed is not None or stop:
                    pool.shutdown(cancel_futures=True)
                if failed is not None:
                    failed.result()
                if stop:
                    raise Cancelled("building the index was cancelled")
                if on_progress is not None and done_now:
                    on_progress(total - len(waiting), total)
        built = {place: job.result() for job, place in jobs.items()}
        self._indexes = {layer: [built[layer, head] for head in range(n_heads)] for layer in layers}

    def _build_head(self, segment: KVSegment, layer: int, head: int) -> KeyIndex:
        index = make_index(self.spec, self.n_keys)
        sample = segment.query_sample(layer)
        queries = None
        if sample is not None:
            group = sample.shape[0] // segment.layout.n_kv_heads
            queries = sample[head * group : (head + 1) * group].reshape(-1, sample.shape[2]).float().cpu().numpy()
        index.build(self._k[layer][head].float().cpu().numpy(), queries)
        return index

    def attend(self, layer: LayerSpec, q: Tensor, top_k: int) -> Partial:
        """Softmax attention of each query head over its top_k keys by inner product.

        Args:
            layer: which layer; scale and softcap apply to the found scores. Its window is not looked at.
            q: [Hq, D], post-RoPE, any float dtype.
            top_k: at least 1; more than there are keys reads them all.

        Raises:
            InvalidRequest: top_k below 1, q of another shape, or a layer that was not indexed.
        """
        n_q, n_kv, d = layer.n_q_heads, self._k[0].shape[0], self._k[0].shape[2]
        if top_k < 1:
            raise InvalidRequest(f"top_k must be at least 1, got {top_k}")
        if q.shape != (n_q, d) or n_q % n_kv:
            raise InvalidRequest(f"q must have the shape [{n_q}, {d}], got {list(q.shape)}")
        device = self._k[0].device
        if not self.n_keys:
            return Partial(torch.zeros(n_q, d, device=device), torch.full((n_q,), -torch.inf, device=device), 0)
        top_k = min(top_k, self.n_keys)
        queries = q.to(device, torch.float32).reshape(n_kv, n_q // n_kv, d)
        if layer.idx in self._indexes:
            ids, scores, scanned = self._search(layer.idx, queries, top_k)
        else:
            ids, scores, scanned = self._score(layer.idx, queries, top_k)
        return self._attend(layer, ids, scores, scanned)

    def _search(self, layer: int, q: Tensor, k: int) -> tuple[Tensor, Tensor, int]:
        """ids [Hkv, g, k] and scores by the FAISS indexes, and keys scored."""
        heads = self._indexes[layer]
        before = sum(index.stats.keys_scanned for index in heads)
        found = [index.search(rows.cpu().numpy(), k) for index, rows in zip(heads, q, strict=True)]
        ids = torch.from_numpy(np.stack([ids for ids, _ in found])).to(q.device)
        scores = torch.from_numpy(np.stack([scores for _, scores in found])).to(q.device)
        return ids, scores, sum(index.stats.keys_scanned for index in heads) - before

    def _score(self, layer: int, q: Tensor, k: int) -> tuple[Tensor, Tensor, int]:
        """As `_search`, by scoring every key.

        On the CPU one small matrix product for each KV head, keys on the left; then NumPy's argpartition, which beats
        torch.topk 3 to 1. Torch multiplies and not NumPy, whose BLAS keeps threads of its own that nothing here can limit:
        beside another busy process they spin and a token takes ten times as long.
        """
        n_kv, group, _ = q.shape
        n = self.n_keys
        if layer in self._flat:
            table = torch.empty(n_kv, group, n)
            for keys, rows, into in zip(self._flat[layer], q, table, strict=True):
                into.copy_(torch.mm(keys, rows.T).T)
            scores = table.numpy()
            if k == n:
                ids = np.broadcast_to(np.arange(n), scores.shape)
                return torch.from_numpy(ids.copy()), torch.from_numpy(scores), scores.size
            ids = np.ascontiguousarray(np.argpartition(scores, n - k, axis=-1)[..., n - k :])
            return torch.from_numpy(ids), torch.from_numpy(np.take_along_axis(scores, ids, -1)), scores.size
        if self._k[layer].device.type == "cpu":
            raise InvalidRequest(f"layer {layer} was not indexed")
        parts = [q @ keys.float().transpose(1, 2) for keys in torch.split(self._k[layer], _CHUNK_KEYS, dim=1)]
        top = torch.cat(parts, dim=-1).topk(k, dim=-1)
        return top.indices, top.values, n_kv * group * n

    def _attend(self, layer: LayerSpec, ids: Tensor, scores: Tensor, scanned: int) -> Partial:
        n_kv, group, k = ids.shape
        z = scores * layer.scale
        if layer.softcap:
            z = layer.softcap * torch.tanh(z / layer.softcap)
        found = ids >= 0
        n_found = int(found.sum())
        if n_found < found.numel():
            z = z.masked_fill(~found, -torch.inf)
            ids = ids.clamp_min(0)
        v = _take(self._v[layer.idx], (ids + self._row_base).view(-1))  # [Hkv g k, D]
        lse = torch.logsumexp(z, dim=-1, keepdim=True)  # [Hkv, g, 1]; -inf where nothing was found
        p = torch.exp(z - torch.where(lse == -torch.inf, 0.0, lse)).view(n_kv * group, 1, k)
        out = torch.bmm(p, v.float().view(n_kv * group, k, -1))
        return Partial(out.view(layer.n_q_heads, -1), lse.view(-1), n_found, scanned)


def _take(table: Tensor, rows: Tensor) -> Tensor:
    """table[rows] for a contiguous table [n, D]. On the CPU by NumPy, on raw bits: 11 us for 900 rows of 64 bf16, against
    50 us by index_select and 227 us by indexing."""
    if table.device.type != "cpu":
        return table.index_select(0, rows)
    bits = table if table.dtype == torch.float32 else table.view(torch.int16)
    return torch.from_numpy(bits.numpy().take(rows.numpy(), axis=0)).view(table.dtype)


class LocalRetrieval:
    """A `RetrievalSession` in this process. With a pool, searches overlap with the caller's own work.

    Args:
        index: shared by several sessions only when each waits for the other (`SegmentIndex.attend` is not reentrant).
        pool: of one thread; None searches when the answer is collected.
    """

    def __init__(self, index: SegmentIndex, pool: ThreadPoolExecutor | None = None) -> None:
        self._index: SegmentIndex | None = index
        self._pool = pool
        self._sink_tokens, self._recent_tokens = index.sink_tokens, index.recent_tokens
        self._asked: dict[int, Callable[[], Partial]] = {}

    @property
    def sink_tokens(self) -> int:
        return self._sink_tokens

    @property
    def recent_tokens(self) -> int:
        return self._recent_tokens

    def submit(self, layer: LayerSpec, q: Tensor, top_k: int) -> None:
        """See RetrievalSession. Raises WorkerLost after `close`."""
        index = self._index
        if index is None:
            raise WorkerLost("the retrieval session is closed")
        if self._pool is None:
            self._asked[layer.idx] = lambda: index.attend(layer, q, top_k)
        else:
            self._asked[layer.idx] = self._pool.submit(index.attend, layer, q, top_k).result

    def collect(self, layer: LayerSpec) -> Partial:
        """See RetrievalSession. Raises WorkerLost after `close`, and whatever the search raised."""
        if self._index is None:
            raise WorkerLost("the retrieval session is closed")
        return self._asked.pop(layer.idx)()

    def close(self) -> None:
        self._index = None
        self._asked.clear()

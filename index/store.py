"""SegmentStore: the prefix cache of one prefill process, with leases, fencing tokens and a byte budget.

Life of a segment: `acquire` makes it, with the longest cached prefix copied in, under a lease that does not expire while
its own process writes it. `publish` seals it, makes it a cache entry (where its method allows) and starts the lease's
time; the holder may be another process, which maps the file, writes the tail behind the sealed tokens and renews.
`release` gives the lease back, an expired lease is swept. The entry stays until the least recently used ones must go.

A holder that was paused past its lease still has the mapping. It can do no harm: every grant has a segment of its own, and
nobody reads the tail of a segment whose lease has ended unless `release` came in time with the latest fencing token.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from winnow.config import KVConfig
from winnow.errors import CorruptBlock, InvalidRequest, LeaseLost, Overloaded, UnknownName
from winnow.index import folder as folders
from winnow.index.layout import SegmentLayout
from winnow.index.prefix import PrefixIndex, ReuseKey, Tokens
from winnow.index.segment import KVSegment, segment_bytes
from winnow.types import SegmentHandle


@dataclass
class StoreStats:
    """A picture of the store, and counters since it was made.

    Attributes:
        bytes, budget: of live segments, by capacity, and of entries' key tiles; and the limit.
        segments, entries, leases: live ones.
        hits, misses: acquisitions that did or did not start from a cached prefix; those without cache count in neither.
        hit_tokens: tokens taken from the cache.
        evictions: entries dropped to make room.
        lease_losses: leases that expired before they were released.
        corrupt: entries found damaged and dropped.
    """

    bytes: int = 0
    budget: int = 0
    segments: int = 0
    entries: int = 0
    leases: int = 0
    hits: int = 0
    misses: int = 0
    hit_tokens: int = 0
    evictions: int = 0
    lease_losses: int = 0
    corrupt: int = 0


@dataclass(eq=False)
class _Held:
    """A live segment: kept by leases, by being an entry, or by pins of copies that are under way."""

    segment: KVSegment
    key: ReuseKey
    leases: set[int] = field(default_factory=set)
    pins: int = 0
    indexed: Tokens | None = None  # the tokens it is an entry for; None = not an entry
    tile_bytes: int = 0  # of its key tiles, counted since it became an entry

    @property
    def size_bytes(self) -> int:
        """What it counts against the budget."""
        return self.segment.size_bytes + self.tile_bytes


@dataclass(eq=False)
class Lease:
    """The right to use a segment until it is released or expires.

    Attributes:
        segment: where to write. Read-only when `is_shared`.
        cached_tokens: leading tokens that are valid already.
        fencing: grows with every grant of this store.
        is_shared: the segment is a cache entry itself, complete, and must not be written.
        expires_at: by the store's clock; None while its own process holds it: then it ends by `release` alone.
    """

    segment: KVSegment
    cached_tokens: int
    fencing: int
    owner: str
    owner_epoch: int
    host_id: str
    use_cache: bool
    is_shared: bool = False
    expires_at: float | None = None

    @property
    def handle(self) -> SegmentHandle:
        """The segment as others name it; made anew, since sealing changes n_tokens and checksum."""
        s = self.segment
        return SegmentHandle(
            segment_id=s.segment_id, owner=self.owner, owner_epoch=self.owner_epoch, host_id=self.host_id, location=s.location,
            n_tokens=s.n_tokens, capacity=s.capacity, kv_layout=s.layout.digest(), checksum=s.checksum, fencing=self.fencing,
        )  # fmt: skip


class SegmentStore:
    """Segments, leases and the prefix cache of one owner. Thread-safe; `clock` may be a fake one.

    Args:
        layout: of every segment here.
        model_fingerprint: part of every cache key.
        config: budget, folder, block size, lease time.
        owner, epoch, host_id: written into every handle; handles of another epoch are refused.
        device: "cpu" keeps segments in mapped files; another device keeps them in this process.

    Raises:
        ConfigError, Overloaded: no folder for the files, see `folder.choose_folder`.
    """

    def __init__(
        self, layout: SegmentLayout, model_fingerprint: str, config: KVConfig, owner: str, epoch: int, host_id: str,
        device: str = "cpu", clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.layout = layout
        self.config = config
        self.owner, self.epoch, self.host_id, self.device = owner, epoch, host_id, device
        self._clock = clock
        self._lock = threading.RLock()
        self._held: OrderedDict[str, _Held] = OrderedDict()  # by segment id, least recently used first
        self._leases: dict[int, Lease] = {}
        self._index = PrefixIndex(model_fingerprint, layout.digest(), config.block_tokens)
        self._bytes = 0
        self._promised = 0  # bytes of segments that are being made
        self._last_fencing = 0
        self._counts = StoreStats()
        self._is_closed = False
        self.folder: Path | None = None
        self._prefix = folders.file_prefix(owner, epoch, uuid.uuid4().hex[:12])
        self._next_id = 0
        self._file_lock: folders.StoreLock | None = None
        self.budget_bytes = config.budget_bytes
        if device == "cpu":
            self.folder = folders.choose_folder(config)
            self.budget_bytes = min(config.budget_bytes, folders.free_bytes(self.folder))
            self._file_lock = folders.StoreLock(self.folder, self._prefix)

    # -- granting ----------------------------------------------------------------------------------------------------

    def acquire(
        self, token_ids: Sequence[int], tail_tokens: int, *, tenant: str = "", method: str = "", context_tokens: int = 0,
        chunk_tokens: int = 0, is_apart: bool = True, use_cache: bool = True, query_sample: tuple[int, int] | None = None,
    ) -> Lease:  # fmt: skip
        """A segment for these tokens and a tail, with the longest cached prefix in it.

        Args:
            token_ids: what will be prefilled (the engine leaves out the prompt's last token). May be empty.
            tail_tokens: capacity behind them. With 0 and an entry of exactly these tokens, the lease is on the entry
                itself (`is_shared`): nothing is copied.
            tenant: part of every key; tenants never share.
            method: "" for an exact method. Otherwise its canonical spec, under which alone its KV is reused.
            context_tokens: with a method, the first n tokens are a context that it plans alone; its KV is reused under other
                questions. 0 = the whole.
            chunk_tokens: with a method, whole chunks of so many tokens depend on no later token: a context that begins with
                the same ones reuses them, in chunks of the same length only. 0 = the context is planned in one piece.
            is_apart: False: what follows the context is computed in one pass with its end, so that it is reused in whole
                chunks only.
            use_cache: False neither reads nor fills the cache.
            query_sample: (Hq, S) to keep query vectors, see KVSegment; never shared, filled by whoever prefills.

        Raises:
            InvalidRequest: tail_tokens, context_tokens or chunk_tokens out of range.
            Overloaded: the segment does not fit the budget, even with every unleased entry evicted.
        """
        for name, value in (("tail_tokens", tail_tokens), ("chunk_tokens", chunk_tokens)):
            if value < 0:
                raise InvalidRequest(f"{name} must be >= 0, got {value}")
        if not 0 <= context_tokens <= len(token_ids):
            raise InvalidRequest(f"context_tokens must be in [0, {len(token_ids)}], got {context_tokens}")
        tokens = np.asarray(token_ids, np.int32)
        key = ReuseKey.of(tenant, method, context_tokens, chunk_tokens, is_apart)
        source, cached = self._pin_source(tokens, key) if use_cache else (None, 0)
        try:
            whole = source is not None and cached == len(tokens) == source.segment.n_tokens
            if source is not None and whole and not tail_tokens and query_sample is None:
                with self._lock:
                    return self._grant(source, cached, use_cache, is_shared=True)
            capacity = max(1, len(tokens) + tail_tokens)
            need = segment_bytes(self.layout, capacity, query_sample)
            with self._lock:
                if source is not None and not self._fits(need):
                    # Holding on to the source would refuse a request that fits without it.
                    self._unpin(source)
                    source, cached = None, 0
                segment_id = self._promise(need, capacity)
            try:
                segment = self._make(segment_id, capacity, query_sample, source, cached)
            except BaseException:
                with self._lock:
                    self._promised -= need
                raise
            with self._lock:
                self._promised -= need  # in one step with the ledger: between them the file would belong to nobody
                if self._is_closed:
                    segment.unlink()
                    raise LeaseLost("the segment store is closed")
                held = self._held[segment_id] = _Held(segment, key)
                self._bytes += need
                return self._grant(held, cached, use_cache)
        finally:
            if source is not None:
                with self._lock:
                    self._unpin(source)

    def _make(
        self, segment_id: str, capacity: int, query_sample: tuple[int, int] | None, source: _Held | None, cached: int
    ) -> KVSegment:
        segment = KVSegment.create(
            self.layout, capacity, dir=self.folder, device=self.device, query_sample=query_sample, segment_id=segment_id
        )
        try:
            if source is not None:
                segment.copy_prefix_from(source.segment, cached)
        except BaseException:
            segment.unlink()
            raise
        return segment

    def _pin_source(self, tokens: Tokens, key: ReuseKey) -> tuple[_Held | None, int]:
        """The entry to start from, pinned and verified (R21), and how many tokens of it. Damaged ones are dropped."""
        while True:
            with self._lock:
                self._sweep()
                held, cached = self._find(tokens, key)
                if held is None:
                    return None, 0
                held.pins += 1
                self._held.move_to_end(held.segment.segment_id)
            try:
                held.segment.verify()
                if np.array_equal(held.segment.token_ids[:cached], tokens[:cached]):
                    return held, cached
                raise CorruptBlock("its token ids are not those it was indexed under")
            except CorruptBlock:
                with self._lock:
                    self._counts.corrupt += 1
                    self._drop_entry(held)
                    self._unpin(held)

    def _find(self, tokens: Tokens, key: ReuseKey) -> tuple[_Held | None, int]:
        """An entry that shares the most whole blocks, and how many leading tokens it shares: hashes know whole blocks and
        entries, tokens the rest."""
        found = self._index.find(tokens, key)
        if found is None or not found[1]:
            return None, 0
        held, cached = self._held[str(found[0])], found[1]
        if not key.method and held.indexed is not None:
            cached = max(cached, _common(held.indexed, tokens))
        return held, cached

    def _promise(self, need: int, capacity: int) -> str:
        """Reserve bytes for a segment that is about to be made, and name it. Raises Overloaded, LeaseLost."""
        if self._is_closed:
            raise LeaseLost("the segment store is closed")
        self._sweep()
        if not self._fits(need):
            raise Overloaded(
                f"KV: {need} bytes needed for {capacity} tokens, budget {self.budget_bytes} bytes, "
                f"{self._bytes + self._promised} in use and not to be evicted "
                "now; shorten the prompt, come back later, or raise kv.budget_bytes"
            )
        self._evict(need)
        self._promised += need
        self._next_id += 1
        return f"{self._prefix}{self._next_id}"

    def _grant(self, held: _Held, cached: int, use_cache: bool, *, is_shared: bool = False) -> Lease:
        self._last_fencing += 1
        if use_cache:
            self._counts.hits += cached > 0
            self._counts.misses += cached == 0
            self._counts.hit_tokens += cached
        lease = Lease(
            held.segment, cached, self._last_fencing, self.owner, self.epoch, self.host_id, use_cache, is_shared
        )  # fmt: skip
        held.leases.add(lease.fencing)
        self._leases[lease.fencing] = lease
        self._held.move_to_end(held.segment.segment_id)
        return lease

    def publish(self, lease: Lease, *, is_given_away: bool = True) -> SegmentHandle:
        """Seal the lease's segment, and make it a cache entry unless the cache holds these tokens already, the lease was taken
        without cache, or the prompt is empty.

        Args:
            is_given_away: the lease's time starts; others, who may be lost, will renew and release it. False: it stays with
                its own process.

        Raises:
            LeaseLost: the lease has ended.
        """
        held = self._holder(lease.handle)
        if not lease.is_shared:
            lease.segment.seal()  # outside the lock: the segment has one writer, the caller
            if lease.use_cache:
                lease.segment.key_tiles.move(lease.segment.device)
        with self._lock:
            held = self._holder(lease.handle)
            if is_given_away:
                lease.expires_at = self._clock() + self.config.lease_s
            if not lease.is_shared:
                if lease.use_cache:
                    self._add_entry(held)
                self._count_tiles(held)
            return lease.handle

    def _count_tiles(self, held: _Held) -> None:
        """Keep a segment's key tiles where it is an entry and they fit beside the others: they save less than an entry does."""
        tiles = held.segment.key_tiles
        if held.indexed is None or self._excess(tiles.size_bytes - held.tile_bytes) > 0:
            tiles.clear()
        self._bytes += tiles.size_bytes - held.tile_bytes
        held.tile_bytes = tiles.size_bytes

    def _add_entry(self, held: _Held) -> None:
        tokens = held.segment.token_ids[: held.segment.n_tokens].copy()
        if not len(tokens) or held.indexed is not None:
            return
        same = self._index.find_whole(tokens, held.key)
        if same is not None:
            self._held.move_to_end(str(same))
            return
        held.indexed = tokens
        self._index.add(held.segment.segment_id, tokens, held.key)

    def _drop_entry(self, held: _Held) -> None:
        """Out of the index; the segment goes too unless leases or pins keep it."""
        if held.indexed is not None:
            self._index.remove(held.segment.segment_id, held.indexed, held.key)
            held.indexed = None
        self._free_if_unused(held)

    def _unpin(self, held: _Held) -> None:
        held.pins -= 1
        self._free_if_unused(held)

    def _free_if_unused(self, held: _Held) -> None:
        if held.indexed is None and not held.leases and not held.pins and held.segment.segment_id in self._held:
            del self._held[held.segment.segment_id]
            self._bytes -= held.size_bytes
            held.segment.unlink()

    def _idle(self) -> list[_Held]:
        """Entries that nobody holds, least recently used first."""
        return [held for held in self._held.values() if not held.leases and not held.pins]

    def _excess(self, need: int) -> int:
        return self._bytes + self._promised + need - self.budget_bytes

    def _fits(self, need: int) -> bool:
        """`need` bytes can be had, with every idle entry evicted if it must be."""
        excess = self._excess(need)
        return excess <= 0 or sum(held.size_bytes for held in self._idle()) >= excess

    def _evict(self, need: int) -> None:
        """Drop idle entries until `need` bytes fit the budget, and the folder: others may have filled it meanwhile."""
        folder = self.folder
        while self._excess(need) > 0 or (folder is not None and folders.free_bytes(folder) < need):
            held = next((h for h in self._held.values() if not h.leases and not h.pins), None)
            if held is None:
                return  # then `KVSegment.create` says what the folder lacks
            self._counts.evictions += 1
            self._drop_entry(held)

    # -- holding -----------------------------------------------------------------------------------------------------

    def _holder(self, handle: SegmentHandle) -> _Held:
        """The live segment a handle's lease is on.

        Raises:
            LeaseLost: of another epoch, released, or expired.
            UnknownName: never granted here.
        """
        with self._lock:
            if handle.owner != self.owner:
                raise UnknownName(f"segment {handle.segment_id}: owned by {handle.owner}, not by {self.owner}")
            if handle.owner_epoch != self.epoch:
                raise LeaseLost(f"segment {handle.segment_id}: of epoch {handle.owner_epoch}, {self.owner} is at {self.epoch}")
            if not 0 < handle.fencing <= self._last_fencing:
                raise UnknownName(f"segment {handle.segment_id}: no lease {handle.fencing} was ever granted")
            lease = self._leases.get(handle.fencing)
            if lease is None or self._has_expired(lease):
                raise LeaseLost(f"segment {handle.segment_id}: lease {handle.fencing} has ended; ask for the prompt again")
            if lease.segment.segment_id != handle.segment_id:
                raise UnknownName(f"segment {handle.segment_id}: lease {handle.fencing} is on another segment")
            return self._held[handle.segment_id]

    def _has_expired(self, lease: Lease) -> bool:
        return lease.expires_at is not None and lease.expires_at <= self._clock()

    def get(self, handle: SegmentHandle) -> KVSegment:
        """The segment of a live lease. Raises LeaseLost, UnknownName."""
        return self._holder(handle).segment

    def renew(self, handle: SegmentHandle, ttl_s: float = 0.0) -> float:
        """Prolong a lease from now; returns its time in seconds. ttl_s 0 = kv.lease_s; longer than ten times that is cut.

        Raises:
            LeaseLost, UnknownName: see `get`.
            InvalidRequest: ttl_s is negative or not a number.
        """
        if not ttl_s >= 0:
            raise InvalidRequest(f"ttl_s must be >= 0, got {ttl_s}")
        ttl_s = min(ttl_s or self.config.lease_s, 10 * self.config.lease_s)
        with self._lock:
            self._holder(handle)
            lease = self._leases[handle.fencing]
            if lease.expires_at is not None:
                lease.expires_at = self._clock() + ttl_s
            return ttl_s

    def release(self, handle: SegmentHandle, tail_token_ids: Sequence[int] = ()) -> None:
        """End a lease. With the ids of the tail that was written behind the sealed tokens, the entry grows by it.

        The tail joins only where its KV is what prefill would have computed, so pass it only after an exact decode method;
        it is refused without error where the segment's method is not exact, the bytes are not here (decoded on
        another host), or another lease still reads the segment.

        Raises:
            LeaseLost, UnknownName: see `get`; nothing has changed then.
        """
        with self._lock:
            held = self._holder(handle)
            lease = self._leases.pop(handle.fencing)
            held.leases.discard(handle.fencing)
            held.pins += 1
        try:
            if len(tail_token_ids) and lease.use_cache and not lease.is_shared and not held.key.method:
                self._extend(held, np.asarray(tail_token_ids, np.int32))
        finally:
            with self._lock:
                self._unpin(held)

    def _extend(self, held: _Held, tail: Tokens) -> None:
        segment = held.segment
        n = segment.n_tokens
        with self._lock:
            if held.leases or held.pins > 1 or not segment.is_sealed or self._is_closed:
                return
            if segment.n_total < n + len(tail) or not np.array_equal(segment.token_ids[n : n + len(tail)], tail):
                return
            if held.indexed is not None:  # not findable while its checksum changes
                self._index.remove(segment.segment_id, held.indexed, held.key)
                held.indexed = None
        segment.truncate(n + len(tail))
        segment.seal()
        with self._lock:
            if not self._is_closed:
                self._add_entry(held)

    def sweep(self) -> int:
        """End expired leases and free what only they kept; returns how many. Call it about once per lease time."""
        with self._lock:
            return self._sweep()

    def _sweep(self) -> int:
        expired = [lease for lease in self._leases.values() if self._has_expired(lease)]
        for lease in expired:
            del self._leases[lease.fencing]
            held = self._held[lease.segment.segment_id]
            held.leases.discard(lease.fencing)
            self._free_if_unused(held)
        self._counts.lease_losses += len(expired)
        return len(expired)

    # -- looking and ending ------------------------------------------------------------------------------------------

    def prefix_tokens(
        self, token_ids: Sequence[int], *, tenant: str = "", method: str = "", context_tokens: int = 0, chunk_tokens: int = 0,
        is_apart: bool = True,
    ) -> int:  # fmt: skip
        """How many leading tokens `acquire` would find cached now. Changes nothing."""
        with self._lock:
            key = ReuseKey.of(tenant, method, context_tokens, chunk_tokens, is_apart)
            return self._find(np.asarray(token_ids, np.int32), key)[1]

    def stats(self) -> StoreStats:
        """A copy of the counters and the present sizes."""
        with self._lock:
            c = self._counts
            return StoreStats(
                self._bytes, self.budget_bytes, len(self._held), sum(h.indexed is not None for h in self._held.values()),
                len(self._leases), c.hits, c.misses, c.hit_tokens, c.evictions, c.lease_losses, c.corrupt,
            )  # fmt: skip

    def check(self) -> None:
        """Verify every invariant: ledgers, reference counts, index and files on disk. For tests, after each step.

        Raises:
            CorruptBlock: an invariant is broken; the message names it.
        """
        with self._lock:
            held = self._held
            live = {(lease.segment.segment_id, fencing) for fencing, lease in self._leases.items()}
            facts = {
                "bytes equal the sum of the segments": self._bytes == sum(h.size_bytes for h in held.values()),
                "key tiles are counted": all(
                    h.indexed is None or h.tile_bytes == h.segment.key_tiles.size_bytes for h in held.values()
                ),
                "bytes stay within the budget": self._bytes + self._promised <= self.budget_bytes,
                "every lease is on its segment": live == {(sid, f) for sid, h in held.items() for f in h.leases},
                "fencing tokens were granted": all(0 < f <= self._last_fencing for f in self._leases),
                "no pins below zero": all(h.pins >= 0 for h in held.values()),
                "every segment is kept by something": all(h.leases or h.pins or h.indexed is not None for h in held.values()),
                "the index holds the entries": self._index.entries() == {s for s, h in held.items() if h.indexed is not None},
                "entries are sealed": all(
                    h.indexed is None or (h.segment.n_tokens == len(h.indexed) and h.segment.is_sealed) for h in held.values()
                ),
                "nothing is left after close": not self._is_closed or not held,
            }
            if self.folder is not None and not self._promised:
                on_disk = {path.stem for path in self.folder.glob(f"{self._prefix}*.kv")}
                facts["files on disk are the segments"] = on_disk == set(held)
            broken = [name for name, holds in facts.items() if not holds]
            if broken:
                raise CorruptBlock(f"segment store: not true that {'; '.join(broken)}")
            for h in held.values():
                h.segment.check()

    def close(self) -> None:
        """Remove every file and end every lease. Mappings held elsewhere stay valid."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._leases.clear()
            for held in list(self._held.values()):
                held.leases.clear()
                self._drop_entry(held)
            if self._file_lock is not None:
                self._file_lock.close()

    @classmethod
    def remove_orphans(cls, dir: Path, owner: str, epoch: int) -> int:
        """Delete what dead stores of `owner`, of this epoch or earlier, left behind; returns the number of segments."""
        return folders.remove_orphans(dir, owner, epoch)


def _common(a: Tokens, b: Tokens) -> int:
    """How many leading tokens two sequences share."""
    n = min(len(a), len(b))
    differing = np.flatnonzero(a[:n] != b[:n])
    return int(differing[0]) if differing.size else n

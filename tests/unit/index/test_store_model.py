"""Random interleavings of acquire, publish, write, release, renew, expire, damage and close against a simple model."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from winnow.config import KVConfig
from winnow.errors import LeaseLost, Overloaded
from winnow.index.layout import SegmentLayout
from winnow.index.segment import KVSegment, segment_bytes
from winnow.index.store import Lease, SegmentStore
from winnow.types import SegmentHandle

from .kv_fill import Salt, assert_holds, fill

T = TypeVar("T")
BLOCK = 4
LEASE_S = 10.0
LAYOUT = SegmentLayout(n_layers=1, n_kv_heads=2, head_size=128, dtype="fp32")  # 2 KiB a token: evictions after a few segments
TRUNKS = ([5, 6] * 80, [5, 6, 5, 7] * 40)  # few trunks and leaves: most prompts share a prefix with an earlier one
TOKENS = st.builds(
    lambda trunk, n, leaf: trunk[:n] + leaf,
    st.sampled_from(TRUNKS), st.sampled_from([0, 2, 3, 4, 8, 11, 64, 130, 150]), st.sampled_from([[], [1], [2], [1, 2, 3, 4, 5]]),
)  # fmt: skip
UNTIL = st.sampled_from(["written", "published", "published", "released", "released", "released"])
CHUNK = {"": 0, "m": 0, "n": 8}  # method n plans in chunks of 8 tokens
CONTEXTS = st.sampled_from([0, 0, 3, 8, 11])
JOINED = 11  # a context of so many tokens is never computed apart from what follows it


@dataclass
class Granted:
    """A lease as the model sees it."""

    lease: Lease
    tokens: list[int]  # prompt, then the tail written so far
    n_prompt: int
    salt: Salt
    use_cache: bool
    tenant: str
    method: str
    expires: float | None = None  # None until published

    @property
    def handle(self) -> SegmentHandle:
        return self.lease.handle


@dataclass
class Entry:
    """What the cache may answer from."""

    tokens: list[int]
    tenant: str
    method: str
    context: int


def usable(entry: Entry, tokens: list[int], tenant: str, method: str, context: int) -> int:
    """Leading tokens of `tokens` that this entry may serve, by the rules in words: same tenant and method; for an exact method
    all that they share, if it is a block at least or the entry whole; for others the same context that both end apart, or the
    same whole, or chunks that are whole in both."""
    if (entry.tenant, entry.method) != (tenant, method):
        return 0
    common = next(
        (i for i, (a, b) in enumerate(zip(entry.tokens, tokens, strict=False)) if a != b), min(len(entry.tokens), len(tokens))
    )
    if method:
        ours, theirs = context or len(tokens), entry.context or len(entry.tokens)
        if ours == theirs <= common:
            if entry.tokens == tokens:
                return len(tokens)
            if not is_joined(context, tokens) and not is_joined(entry.context, entry.tokens):
                return ours
        return min(common, ours, theirs) // CHUNK[method] * CHUNK[method] if CHUNK[method] else 0
    return common if common == len(entry.tokens) or common >= BLOCK else 0


def is_joined(context: int, tokens: list[int]) -> bool:
    return context == JOINED < len(tokens)


def salt_of(tokens: list[int], tenant: str, method: str, context: int) -> Salt:
    """What a method's KV depends on: whole chunks on the tokens up to their end, the rest of the context on all of it, and what
    follows on where the context ended. Without a context the whole is its own: both are planned over the same tokens. Where
    context and rest share a pass, what is in it depends on all tokens."""
    if not method:
        return tenant
    own = context or len(tokens)
    ends = range(CHUNK[method], own + 1, CHUNK[method]) if CHUNK[method] else ()
    rest = f"joined/{tokens}" if is_joined(context, tokens) else f"{own}/{tokens[:own]}"
    return (*((end, f"{tenant}/{method}/{tokens[:end]}") for end in ends), (own, f"{tenant}/{method}/{rest}"))


def assert_pooled(segment: KVSegment) -> None:
    """What came with the prefix and what is computed now are the sums of the segment's own keys, three at a time."""
    keys = segment.k(0)[None, :, : segment.n_total]

    def sums(k: torch.Tensor, _: int) -> torch.Tensor:
        return torch.nn.functional.pad(k, (0, 0, 0, -k.shape[2] % 3)).unflatten(2, (-1, 3)).sum(3)

    assert torch.equal(segment.key_tiles.extended("sums", keys, 3, sums), sums(keys, 0))


class StoreMachine(RuleBasedStateMachine):
    """The model: which leases live until when, and which token sequences entries stand for."""

    def __init__(self) -> None:
        super().__init__()
        self.dir = Path(tempfile.mkdtemp(prefix="winnow-test-"))
        self.now = 0.0
        config = KVConfig(dir=str(self.dir), budget_bytes=1 << 20, block_tokens=BLOCK, lease_s=LEASE_S)
        self.store = SegmentStore(LAYOUT, "model", config, "prefill-0", 1, "host", clock=lambda: self.now)
        self.live: list[Granted] = []
        self.dead: list[SegmentHandle] = []
        self.entries: dict[str, Entry] = {}
        self.last_fencing = 0
        self.losses = 0

    @initialize()
    def start(self) -> None:
        self.store.check()

    def on_disk(self) -> set[str]:
        assert self.store.folder is not None
        return {path.stem for path in self.store.folder.glob("*.kv")}

    @staticmethod
    def pick(data: st.DataObject, items: Sequence[T]) -> T | None:
        """One of them. Not a precondition of the rule: Hypothesis gives up when too many rules are shut."""
        return data.draw(st.sampled_from(items)) if items else None

    def size(self, segment_id: str) -> int:
        assert self.store.folder is not None
        file = self.store.folder / f"{segment_id}.kv"
        return file.stat().st_size + self.store._held[segment_id].segment.key_tiles.size_bytes

    def expire(self) -> list[Granted]:
        """The model's sweep: the leases whose time is over."""
        expired = [g for g in self.live if g.expires is not None and g.expires <= self.now]
        for granted in expired:
            self.live.remove(granted)
            self.dead.append(granted.handle)
            self.losses += 1
        return expired

    @rule(
        tokens=TOKENS, tail=st.sampled_from([0, 3, 40]), tenant=st.sampled_from(["", "b"]),
        method=st.sampled_from(["", "", "m", "n"]),
        context=CONTEXTS, use_cache=st.sampled_from([True, True, True, False]), until=UNTIL,
    )  # fmt: skip
    def acquire(self, tokens: list[int], tail: int, tenant: str, method: str, context: int, use_cache: bool, until: str) -> None:
        self.acquire_one(tokens, tail, tenant, method, min(context, len(tokens)) if method else 0, use_cache, until)

    def acquire_one(
        self, tokens: list[int], tail: int, tenant: str, method: str, context: int, use_cache: bool, until: str
    ) -> None:
        lapsed = {g.lease.segment.segment_id for g in self.expire()}
        before = self.on_disk()
        held = {g.lease.segment.segment_id for g in self.live}
        best = max((usable(e, tokens, tenant, method, context) for e in self.entries.values()), default=0) if use_cache else 0
        need = segment_bytes(LAYOUT, max(1, len(tokens) + tail))
        lapsed &= before - held - set(self.entries)  # nothing keeps these: `acquire` sweeps them before it looks for room
        before -= lapsed
        spare = self.store.budget_bytes - self.store.stats().bytes + sum(self.size(sid) for sid in lapsed)
        try:
            lease = self.store.acquire(
                tokens,
                tail,
                tenant=tenant,
                method=method,
                context_tokens=context,
                chunk_tokens=CHUNK[method],
                is_apart=context != JOINED,
                use_cache=use_cache,
            )
        except Overloaded:
            leased = sum(self.size(sid) for sid in held)
            assert leased + need > self.store.budget_bytes, "refused although evicting idle entries would have made room"
            return
        assert lease.fencing > self.last_fencing
        self.last_fencing = lease.fencing
        salt = salt_of(tokens, tenant, method, context)
        assert_holds(lease.segment, tokens[: lease.cached_tokens], salt)
        granted = Granted(lease, list(tokens), len(tokens), salt, use_cache, tenant, method, None)
        self.live.append(granted)
        gone = before - self.on_disk()
        if lease.is_shared:
            assert tail == 0 and best == len(tokens) and not gone
        assert not gone & held, "leased KV was evicted"
        assert not gone - set(self.entries), "only entries are evicted"
        if gone:
            assert spare < need, "evicted without need"
        if lease.cached_tokens != best and lease.cached_tokens == 0:
            assert spare < need, "only a tight budget may cost a hit"
        elif lease.cached_tokens != best:
            least = best // BLOCK * BLOCK  # entries that share equally many whole blocks are not told apart by the rest
            assert not method and least <= lease.cached_tokens < best
        for sid in gone:
            self.entries.pop(sid, None)
        if not lease.is_shared:
            fill(lease.segment, tokens, salt)
            if method == "n" and tokens:
                assert_pooled(lease.segment)
        if until != "written":
            self.publish_one(granted, tenant, method, context)
        if until == "released":
            self.release_one(granted, [])

    @rule(
        data=st.data(),
        leaf=st.sampled_from([[], [], [1], [3, 3, 3, 3, 3]]),
        tail=st.sampled_from([0, 0, 3, 40]),
        until=UNTIL,
        swap=st.booleans(),
    )
    def acquire_again(self, data: st.DataObject, leaf: list[int], tail: int, until: str, swap: bool) -> None:
        """The prompt of an entry, as it is or longer, perhaps under another method."""
        sid = self.pick(data, sorted(self.entries))
        if sid is not None:
            e = self.entries[sid]
            method = {"m": "n", "n": "m"}.get(e.method, "") if swap else e.method
            self.acquire_one([*e.tokens, *leaf][:200], tail, e.tenant, method, e.context, True, until)

    def publish_one(self, granted: Granted, tenant: str, method: str, context: int) -> None:
        handle = self.store.publish(granted.lease)
        assert handle.checksum and handle.n_tokens == len(granted.tokens)
        granted.expires = self.now + LEASE_S
        own = context or len(granted.tokens)
        known = any(
            (e.tenant, e.method) == (tenant, method)
            and (
                (e.tokens == granted.tokens and (not method or (e.context or len(e.tokens)) == own))
                # all of it is the context, and one that ended apart in another entry serves it as well
                or (method and own == len(granted.tokens) == e.context != JOINED and e.tokens[:own] == granted.tokens)
            )
            for e in self.entries.values()
        )
        if granted.use_cache and granted.tokens and not known and not granted.lease.is_shared:
            self.entries[handle.segment_id] = Entry(list(granted.tokens), tenant, method, context)

    @rule(data=st.data(), ids=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def write_tail(self, data: st.DataObject, ids: list[int]) -> None:
        granted = self.pick(data, self.live)
        if granted is None:
            return
        room = granted.lease.segment.capacity - len(granted.tokens)
        if granted.lease.is_shared or granted.expires is None or room < len(ids):
            return
        fill(granted.lease.segment, [*granted.tokens, *ids], granted.salt)
        granted.tokens += ids

    @rule(data=st.data(), with_tail=st.booleans(), left_out=st.sampled_from([0, 0, 1]))
    def release(self, data: st.DataObject, with_tail: bool, left_out: int) -> None:
        granted = self.pick(data, self.live)
        if granted is not None:
            del granted.tokens[max(granted.n_prompt, len(granted.tokens) - left_out) :]
            self.release_one(granted, granted.tokens[granted.n_prompt :] if with_tail else [])

    def release_one(self, granted: Granted, tail: list[int]) -> None:
        handle = granted.handle
        if granted.expires is not None and granted.expires <= self.now:
            with pytest.raises(LeaseLost):
                self.store.release(handle, tail)
            return
        self.store.release(handle, tail)
        self.live.remove(granted)
        self.dead.append(handle)
        sid = granted.lease.segment.segment_id
        others = any(g.lease.segment.segment_id == sid for g in self.live)
        if tail and granted.expires is not None and granted.use_cache and not granted.method and not others:
            self.entries.pop(sid, None)
            if not any((e.tokens, e.tenant, e.method) == (granted.tokens, granted.tenant, "") for e in self.entries.values()):
                self.entries[sid] = Entry(list(granted.tokens), granted.tenant, "", 0)

    @rule(data=st.data(), ttl=st.sampled_from([0.0, 3.0, 30.0, 1e6]))
    def renew(self, data: st.DataObject, ttl: float) -> None:
        granted = self.pick(data, self.live)
        if granted is None:
            return
        if granted.expires is not None and granted.expires <= self.now:
            with pytest.raises(LeaseLost):
                self.store.renew(granted.handle, ttl)
            return
        given = self.store.renew(granted.handle, ttl)
        assert given == min(ttl or LEASE_S, 10 * LEASE_S)
        if granted.expires is not None:
            granted.expires = self.now + given

    @rule(seconds=st.sampled_from([0.5, 4.0, 10.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def sweep(self) -> None:
        before = self.losses
        self.expire()
        self.store.sweep()
        assert self.store.stats().lease_losses == self.losses >= before

    @rule(data=st.data())
    def use_a_stale_handle(self, data: st.DataObject) -> None:
        handle = self.pick(data, self.dead)
        if handle is None:
            return
        for call in (self.store.get, self.store.renew, self.store.release):
            with pytest.raises(LeaseLost):
                call(handle)

    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        """A bit flips in an idle entry: the next lookup that meets it must drop it."""
        sid = self.pick(data, sorted(self.entries))
        if sid is None:
            return
        if any(g.lease.segment.segment_id == sid for g in self.live):
            return
        self.expire()
        self.store.sweep()
        entry = self.entries[sid]
        segment = self.store._held[sid].segment
        good = float(segment.v(0)[0, 0, 0])
        segment.v(0)[0, 0, 0] += 1.0
        corrupt = self.store.stats().corrupt
        lease = self.store.acquire(
            entry.tokens, 0, tenant=entry.tenant, method=entry.method, context_tokens=entry.context,
            chunk_tokens=CHUNK[entry.method], is_apart=entry.context != JOINED,
        )  # fmt: skip
        if self.store.stats().corrupt > corrupt:
            self.entries.pop(sid)
        else:  # another entry served it, or none could be afforded: mend this one
            segment.v(0)[0, 0, 0] -= 1.0
        self.last_fencing = lease.fencing
        assert not lease.cached_tokens or float(lease.segment.v(0)[0, 0, 0]) == good, "damaged KV was used"
        self.store.release(lease.handle)
        for gone in set(self.entries) - self.on_disk():
            del self.entries[gone]

    @invariant()
    def holds(self) -> None:
        self.store.check()
        stats = self.store.stats()
        assert stats.entries == len(self.entries)
        assert stats.bytes <= stats.budget
        for granted in self.live:
            if granted.expires is None or granted.expires > self.now:
                assert_holds(self.store.get(granted.handle), granted.tokens, granted.salt)

    def teardown(self) -> None:
        for granted in self.live:
            if granted.expires is None or granted.expires > self.now:
                self.store.release(granted.handle)
        self.now += 1e9
        self.store.sweep()
        stats = self.store.stats()
        assert (stats.leases, stats.segments) == (0, stats.entries), "a ledger did not return to zero"
        self.store.close()
        assert self.store.folder is not None
        assert list(self.store.folder.iterdir()) == []
        shutil.rmtree(self.dir)


TestStoreAgainstModel = pytest.mark.promise("R3")(
    pytest.mark.promise("R12")(pytest.mark.promise("R13")(pytest.mark.timeout(180)(StoreMachine.TestCase)))
)
TestStoreAgainstModel.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)

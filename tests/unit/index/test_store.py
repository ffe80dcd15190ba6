"""SegmentStore: reuse, leases, budget. The random interleavings are in test_store_model.py."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from winnow.config import KVConfig
from winnow.errors import InvalidRequest, LeaseLost, Overloaded, UnknownName
from winnow.index.folder import choose_folder
from winnow.index.segment import KVSegment, segment_bytes
from winnow.index.store import Lease, SegmentStore
from winnow.types import SegmentHandle

from .kv_fill import TINY, assert_holds, fill

PROMPT = list(range(10, 33))  # 23 tokens: five blocks of 4 and a rest of 3


class Clock:
    """Time that moves when told."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(kv_config: KVConfig, clock: Clock) -> Iterator[SegmentStore]:
    store = SegmentStore(TINY, "model-a", kv_config, "prefill-0", 3, "host", clock=clock)
    yield store
    store.check()
    store.close()
    store.check()
    assert store.folder is not None
    assert list(store.folder.iterdir()) == []


def run(store: SegmentStore, tokens: list[int], *, tail: int = 4, keep: bool = False, salt: str = "", **kw: Any) -> Lease:
    """What a prefill does: acquire, compute what is missing, publish; and release unless `keep`."""
    lease = store.acquire(tokens, tail, **kw)
    store.check()
    if not lease.is_shared:
        fill(lease.segment, tokens, salt)
    store.publish(lease)
    store.check()
    if not keep:
        store.release(lease.handle)
        store.check()
    return lease


def test_a_second_prompt_starts_where_it_differs_once_a_whole_block_is_shared(store: SegmentStore) -> None:
    assert run(store, PROMPT).cached_tokens == 0
    assert run(store, [*PROMPT[:14], 1, 2, 3]).cached_tokens == 14
    assert run(store, PROMPT[:3]).cached_tokens == 0
    assert run(store, [9, *PROMPT]).cached_tokens == 0
    lease = run(store, [*PROMPT[:14], 1, 2, 9], keep=True)
    assert lease.cached_tokens == 16  # of the second prompt, not 12 of the first
    assert_holds(lease.segment, [*PROMPT[:14], 1, 2, 9])


def test_a_prompt_whose_entry_grew_by_its_answer_is_still_found_whole(store: SegmentStore) -> None:
    lease = run(store, PROMPT, keep=True)
    fill(lease.segment, [*PROMPT, 1, 2])
    store.release(lease.handle, [1, 2])
    lease = run(store, PROMPT, keep=True)
    assert lease.cached_tokens == len(PROMPT) == lease.segment.n_tokens
    assert_holds(lease.segment, PROMPT)


def test_a_whole_entry_is_found_at_its_exact_length(store: SegmentStore) -> None:
    run(store, PROMPT)
    lease = run(store, [*PROMPT, 1, 2], keep=True)
    assert lease.cached_tokens == 23
    assert_holds(lease.segment, [*PROMPT, 1, 2])
    assert run(store, PROMPT[:2]).cached_tokens == 0
    assert run(store, PROMPT[:2]).cached_tokens == 2  # shorter than a block
    assert run(store, [*PROMPT[:2], 5]).cached_tokens == 2


def test_a_full_hit_needs_no_prefill_and_adds_no_second_entry(store: SegmentStore) -> None:
    run(store, PROMPT)
    lease = run(store, PROMPT, keep=True)
    assert lease.cached_tokens == lease.segment.n_tokens == len(PROMPT)
    assert (store.stats().entries, store.stats().segments) == (1, 2)
    store.release(lease.handle)
    assert (store.stats().entries, store.stats().segments) == (1, 1)


def pooled(segment: KVSegment) -> list[int]:
    """Make sure that the sums of a segment's keys are known, four at a time; the numbers of keys that had to be read for it."""
    read: list[int] = []

    def sums(k: torch.Tensor, _: int) -> torch.Tensor:
        read.append(k.shape[2])
        return torch.nn.functional.pad(k, (0, 0, 0, -k.shape[2] % 4)).unflatten(2, (-1, 4)).sum(3)

    keys = segment.k(0)[None, :, : segment.n_total]
    assert torch.equal(segment.key_tiles.extended("sums", keys, 4, sums), sums(keys, 0))
    return read[:-1]


def run_pooling(store: SegmentStore, tokens: list[int], **kw: Any) -> tuple[SegmentHandle, list[int]]:
    lease = store.acquire(tokens, 4, method="m", chunk_tokens=8, **kw)
    fill(lease.segment, tokens)
    read = pooled(lease.segment)
    handle = store.publish(lease)
    store.check()
    store.release(handle)
    return handle, read


def test_key_tiles_come_with_the_tokens_of_an_entry_and_count_against_the_budget(store: SegmentStore) -> None:
    handle, read = run_pooling(store, PROMPT)
    assert read == [23]
    entry = store._held[handle.segment_id]
    assert entry.tile_bytes == 5 * TINY.n_kv_heads * TINY.row_bytes, "of whole tiles"
    assert store.stats().bytes == entry.segment.size_bytes + entry.tile_bytes
    assert run_pooling(store, [*PROMPT[:18], 1, 2, 3])[1] == [21 - 16], "two chunks of 8 tokens are reused, four tiles of them"
    assert run_pooling(store, [*PROMPT, 1])[1] == [24 - 16]
    _, read = run_pooling(store, PROMPT, use_cache=False)
    assert read == [23] and store.stats().entries == 3


def test_key_tiles_that_do_not_fit_the_budget_are_forgotten(store: SegmentStore) -> None:
    store.budget_bytes = segment_bytes(TINY, len(PROMPT) + 4)
    handle, _ = run_pooling(store, PROMPT)
    assert store.stats().bytes == store.budget_bytes and store._held[handle.segment_id].segment.key_tiles.size_bytes == 0
    store.budget_bytes *= 2
    assert run_pooling(store, [*PROMPT[:18], 1, 2, 3])[1] == [21], "made up for"


def test_documents_without_a_tail_are_leased_in_place(store: SegmentStore) -> None:
    first = run(store, PROMPT, tail=0)
    second, third = run(store, PROMPT, tail=0, keep=True), run(store, PROMPT, tail=0, keep=True)
    assert second.is_shared and third.is_shared and not first.is_shared
    assert second.segment is third.segment is first.segment
    assert second.fencing < third.fencing
    store.release(second.handle)
    assert_holds(store.get(third.handle), PROMPT)
    assert store.stats().segments == 1


@pytest.mark.promise("R29")
def test_tenants_and_models_never_share(store: SegmentStore, kv_config: KVConfig) -> None:
    run(store, PROMPT, tenant="a")
    assert run(store, PROMPT, tenant="b").cached_tokens == 0
    assert run(store, PROMPT).cached_tokens == 0
    assert run(store, PROMPT, tenant="a").cached_tokens == 23
    other = SegmentStore(TINY, "model-b", kv_config, "prefill-0", 3, "host")
    assert run(other, PROMPT, tenant="a").cached_tokens == 0
    other.close()


def test_a_tenants_name_cannot_imitate_another_key(store: SegmentStore) -> None:
    run(store, PROMPT, tenant="a", method="m")
    assert run(store, PROMPT, tenant="am", method="").cached_tokens == 0
    assert run(store, PROMPT, tenant="", method="am").cached_tokens == 0


@pytest.mark.promise("R20")
def test_kv_that_is_not_prefix_safe_never_enters_the_shared_cache(store: SegmentStore) -> None:
    run(store, PROMPT, method="flexprefill:gamma=0.9", salt="flex")
    assert run(store, PROMPT).cached_tokens == 0, "dense must not see it"
    assert run(store, [*PROMPT, 1], method="flexprefill:gamma=0.9", salt="flex").cached_tokens == 0, "a prefix is not enough"
    assert run(store, PROMPT, method="flexprefill:gamma=0.5").cached_tokens == 0, "another parameter is another method"
    lease = run(store, PROMPT, method="flexprefill:gamma=0.9", keep=True)
    assert lease.cached_tokens == 23
    assert_holds(lease.segment, PROMPT, "flex")


@pytest.mark.promise("R20")
def test_whole_chunks_of_a_method_serve_every_context_that_begins_with_them(store: SegmentStore) -> None:
    """PROMPT has 23 tokens: two chunks of 8, whose KV depends on no later token, and a third that ends with the context."""
    key = {"method": "recall", "chunk_tokens": 8}
    run(store, PROMPT, **key)
    assert store.prefix_tokens([*PROMPT, 1], **key) == 16
    assert store.prefix_tokens([*PROMPT[:20], 1, 2, 3], **key) == 16
    assert store.prefix_tokens(PROMPT[:15], **key) == 8, "a chunk that is shorter is another one"
    assert store.prefix_tokens(PROMPT, context_tokens=9, **key) == 8
    assert store.prefix_tokens(PROMPT, **key) == 23
    assert store.prefix_tokens([9, *PROMPT], **key) == 0
    assert store.prefix_tokens(PROMPT) == 0
    for other in (0, 4):
        assert store.prefix_tokens(PROMPT, method="recall", chunk_tokens=other) == 0, "other chunks are other plans"
    run(store, [*PROMPT, 7, 7, 7], context_tokens=17, **key)
    assert store.prefix_tokens([*PROMPT, 7, 7, 7], **key) == 16, "behind its context the other one's third chunk is dense"
    assert store.prefix_tokens([*PROMPT, 8], context_tokens=17, **key) == 17
    run(store, [*PROMPT, 9, 9], context_tokens=20, is_apart=False, **key)
    assert store.prefix_tokens([*PROMPT, 9, 9], context_tokens=20, is_apart=False, **key) == 25
    assert store.prefix_tokens([*PROMPT, 9, 8], context_tokens=20, is_apart=False, **key) == 16, "not to the context's end"
    assert store.prefix_tokens([*PROMPT, 9, 9], context_tokens=20, **key) == 16, "computed apart it is another one"
    with pytest.raises(InvalidRequest, match="chunk_tokens must be >= 0"):
        store.acquire(PROMPT, 0, method="m", chunk_tokens=-1)


@pytest.mark.promise("R20")
def test_a_context_planned_alone_is_reused_under_another_question(store: SegmentStore) -> None:
    key = {"method": "flexprefill", "context_tokens": 18}
    run(store, PROMPT, salt="flex", **key)
    lease = run(store, [*PROMPT[:18], 1, 2], keep=True, salt="flex", **key)
    assert lease.cached_tokens == 18
    assert_holds(lease.segment, [*PROMPT[:18], 1, 2], "flex")
    assert run(store, PROMPT, salt="flex", **key).cached_tokens == 23, "the same question again is known whole"
    assert run(store, [9, *PROMPT[1:]], **key).cached_tokens == 0
    assert run(store, PROMPT, method="flexprefill", context_tokens=17).cached_tokens == 0
    assert run(store, PROMPT, method="flexprefill").cached_tokens == 0


def test_without_cache_nothing_is_read_or_kept(store: SegmentStore) -> None:
    run(store, PROMPT)
    assert run(store, PROMPT, use_cache=False).cached_tokens == 0
    stats = store.stats()
    assert (stats.entries, stats.segments, stats.hits, stats.misses) == (1, 1, 0, 1)


def test_the_generated_tail_joins_the_entry_after_release(store: SegmentStore) -> None:
    lease = run(store, PROMPT, keep=True)
    fill(lease.segment, [*PROMPT, 1, 2, 3])  # what decode does: the prompt's last token, then generated ones
    store.release(lease.handle, [1, 2])
    store.check()
    turn = run(store, [*PROMPT, 1, 2, 7, 8], keep=True)
    assert turn.cached_tokens == 25
    assert_holds(turn.segment, [*PROMPT, 1, 2, 7, 8])
    assert store.stats().entries == 2


def test_the_tail_of_a_repeated_prompt_becomes_an_entry_of_its_own(store: SegmentStore) -> None:
    run(store, PROMPT)
    lease = run(store, PROMPT, keep=True)
    fill(lease.segment, [*PROMPT, 1, 2])
    store.release(lease.handle, [1, 2])
    assert store.stats().entries == 2
    assert store.prefix_tokens([*PROMPT, 1, 2, 3]) == 25


@pytest.mark.parametrize("tail", [[1, 2, 3], [2, 1], [9]])
def test_a_tail_that_is_not_in_the_segment_is_not_believed(store: SegmentStore, tail: list[int]) -> None:
    lease = run(store, PROMPT, keep=True)
    fill(lease.segment, [*PROMPT, 1, 2])
    store.release(lease.handle, tail)
    assert store.prefix_tokens([*PROMPT, *tail]) == 23


def test_an_entry_does_not_grow_while_another_lease_reads_it(store: SegmentStore) -> None:
    writer = run(store, PROMPT, keep=True)
    reader = run(store, PROMPT, tail=0, keep=True)
    assert reader.is_shared
    before = reader.handle
    fill(writer.segment, [*PROMPT, 1])
    store.release(writer.handle, [1])
    assert store.prefix_tokens([*PROMPT, 1]) == 23
    assert reader.handle == before
    assert_holds(store.get(before), PROMPT)


def test_a_tail_after_a_method_that_is_not_prefix_safe_is_left_out(store: SegmentStore) -> None:
    lease = run(store, PROMPT, keep=True, method="m")
    fill(lease.segment, [*PROMPT, 1])
    store.release(lease.handle, [1])
    assert store.prefix_tokens([*PROMPT, 1], method="m") == 0
    assert store.prefix_tokens(PROMPT, method="m") == 23


@pytest.mark.promise("R12")
def test_a_holder_paused_past_its_lease_can_neither_release_nor_reach_the_entry(store: SegmentStore, clock: Clock) -> None:
    paused = run(store, PROMPT, keep=True)
    stale = paused.handle
    clock.now += 10.5
    second = run(store, PROMPT, keep=True)
    assert second.fencing > paused.fencing
    fill(paused.segment, [*PROMPT, 66])  # it wakes up and writes through its old mapping
    with pytest.raises(LeaseLost):
        store.release(stale, [66])
    with pytest.raises(LeaseLost):
        store.renew(stale, 5)
    with pytest.raises(LeaseLost):
        store.get(stale)
    assert store.prefix_tokens([*PROMPT, 66]) == 23
    assert_holds(store.get(second.handle), PROMPT)
    second.segment.verify()
    assert run(store, [*PROMPT, 66], keep=True).cached_tokens == 23
    assert store.stats().lease_losses == 1


@pytest.mark.promise("R13")
def test_an_expired_lease_frees_its_segment_and_harms_no_neighbour(store: SegmentStore, clock: Clock) -> None:
    leases = [run(store, [100 + i, *PROMPT], keep=True, use_cache=False) for i in range(4)]
    clock.now += 6
    for lease in leases[1:]:
        assert store.renew(lease.handle) == 10.0
    clock.now += 6
    assert store.sweep() == 1
    store.check()
    assert store.stats().segments == 3
    for i, lease in enumerate(leases[1:], 1):
        assert_holds(store.get(lease.handle), [100 + i, *PROMPT])
    with pytest.raises(LeaseLost):
        store.get(leases[0].handle)


def test_a_segment_being_written_by_its_owner_does_not_expire(store: SegmentStore, clock: Clock) -> None:
    lease = store.acquire(PROMPT, 4)
    clock.now += 1000
    assert store.sweep() == 0
    fill(lease.segment, PROMPT)
    store.publish(lease)
    clock.now += 9
    assert_holds(store.get(lease.handle), PROMPT)
    store.release(lease.handle)


@pytest.mark.promise("R13")
def test_the_least_recently_used_idle_entry_goes_first_and_leased_ones_never(store: SegmentStore) -> None:
    size = segment_bytes(TINY, 404)
    fits = store.budget_bytes // size
    assert fits >= 4
    held = run(store, [0] * 400, keep=True)
    for i in range(1, fits):
        run(store, [i] * 400)
    assert run(store, [1] * 400, tail=4).cached_tokens == 400, "used again; its copy pushed entry 2 out"
    assert store.stats().evictions == 1
    run(store, [99] * 400)
    known = {i for i in range(fits) if store.prefix_tokens([i] * 400)}
    assert known == set(range(fits)) - {2}
    run(store, [98] * 400)
    assert {i for i in range(fits) if store.prefix_tokens([i] * 400)} == set(range(fits)) - {2, 3}
    assert_holds(store.get(held.handle), [0] * 400)


def test_what_cannot_fit_is_refused_with_the_bytes_and_evicts_nothing(store: SegmentStore) -> None:
    run(store, PROMPT)
    with pytest.raises(
        Overloaded, match=rf"{segment_bytes(TINY, 9000)} bytes needed for 9000 tokens, budget {store.budget_bytes}"
    ):
        store.acquire([1] * 9000, 0)
    leases = []
    with pytest.raises(Overloaded):
        for i in range(100):
            leases.append(store.acquire([i] * 400, 4))
    assert store.stats().bytes <= store.budget_bytes
    store.check()
    for lease in leases:
        store.release(lease.handle)
    store.check()
    assert store.acquire([1] * 400, 4).cached_tokens == 0


def test_a_hit_that_fits_only_without_its_source_goes_cold_instead_of_failing(store: SegmentStore) -> None:
    run(store, [1] * 1500)
    lease = run(store, [1] * 1500, keep=True)
    assert lease.cached_tokens == 0
    assert store.stats().evictions == 1
    assert_holds(lease.segment, [1] * 1500)


@pytest.mark.promise("R21")
def test_a_damaged_entry_is_dropped_counted_and_recomputed(store: SegmentStore) -> None:
    bad = run(store, PROMPT)
    bad.segment.k(1)[0, 2, 3] += 1.0
    lease = run(store, PROMPT, keep=True)
    assert lease.cached_tokens == 0
    assert_holds(lease.segment, PROMPT)
    assert (store.stats().corrupt, store.stats().entries) == (1, 1)
    lease.segment._ids[0] = 5
    assert run(store, PROMPT).cached_tokens == 0
    assert store.stats().corrupt == 2


@pytest.mark.promise("R14")
def test_handles_of_another_epoch_owner_or_grant_are_refused(store: SegmentStore) -> None:
    handle = run(store, PROMPT, keep=True).handle
    other = run(store, [1, 2, 3], keep=True).handle
    for change, error in [
        ({"owner_epoch": 2}, LeaseLost), ({"owner_epoch": 4}, LeaseLost), ({"owner": "prefill-1"}, UnknownName),
        ({"fencing": 0}, UnknownName), ({"fencing": 99}, UnknownName), ({"fencing": other.fencing}, UnknownName),
    ]:  # fmt: skip
        for call in (store.get, store.renew, store.release):
            with pytest.raises(error):
                call(dataclasses.replace(handle, **change))  # type: ignore[arg-type]
    store.release(handle)
    with pytest.raises(LeaseLost):
        store.release(handle)


@pytest.mark.parametrize("kw", [{"tail_tokens": -1}, {"context_tokens": 24}, {"context_tokens": -1}])
def test_numbers_out_of_range_are_refused(store: SegmentStore, kw: dict[str, int]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(kw))):
        store.acquire(PROMPT, **{"tail_tokens": 1, **kw})  # type: ignore[arg-type]
    lease = run(store, PROMPT, keep=True)
    for ttl in (-1.0, float("nan")):
        with pytest.raises(InvalidRequest, match="ttl_s"):
            store.renew(lease.handle, ttl)
    assert store.renew(lease.handle, 1e9) == 100.0


def test_an_empty_prompt_has_a_segment_and_no_entry(store: SegmentStore) -> None:
    lease = run(store, [], keep=True)
    assert lease.segment.is_sealed and lease.segment.n_tokens == 0
    fill(lease.segment, [4, 5])
    store.release(lease.handle, [4, 5])
    assert store.prefix_tokens([4, 5, 6]) == 2


def test_a_store_outside_files_keeps_plain_tensors(kv_config: KVConfig) -> None:
    store = SegmentStore(TINY, "m", kv_config, "prefill-0", 1, "host")
    local = SegmentStore(TINY, "m", kv_config, "prefill-0", 1, "host", device="meta")
    assert local.folder is None
    lease = local.acquire(PROMPT, 2)
    assert (lease.handle.location, lease.segment.device.type) == ("", "meta")
    local.release(lease.handle)
    local.check()
    local.close()
    store.close()


def test_closing_removes_the_files_and_refuses_new_work(store: SegmentStore) -> None:
    lease = run(store, PROMPT, keep=True)
    store.close()
    assert_holds(lease.segment, PROMPT)
    with pytest.raises(LeaseLost):
        store.get(lease.handle)
    with pytest.raises(LeaseLost, match="closed"):
        store.acquire(PROMPT, 1)


def test_many_threads_share_one_store(store: SegmentStore) -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for i in range(25):
                tokens = [(seed + i) % 3] * 30 + [seed, i]
                lease = store.acquire(tokens, 4)
                fill(lease.segment, tokens)
                store.publish(lease)
                assert_holds(store.get(lease.handle), tokens)
                fill(lease.segment, [*tokens, 8])
                store.release(lease.handle, [8])
                store.check()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert store.stats().leases == 0
    assert store.stats().hits > 0


@pytest.mark.promise("R13")
def test_the_files_of_a_killed_owner_are_removed_and_those_of_a_live_one_are_not(kv_config: KVConfig, tmp_path: Path) -> None:
    code = """
import sys
from winnow.config import KVConfig
from winnow.index.layout import SegmentLayout
from winnow.index.store import SegmentStore
config = KVConfig(dir=sys.argv[1], budget_bytes=1 << 20)
store = SegmentStore(SegmentLayout(2, 2, 16, "fp32"), "m", config, "prefill-0", 5, "host")
leases = [store.acquire([1, 2, 3], 4) for _ in range(3)]
print("ready", flush=True)
sys.stdin.readline()
"""
    folder = choose_folder(kv_config)
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    watchdog = threading.Timer(90, child.kill)
    watchdog.start()
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        assert SegmentStore.remove_orphans(folder, "prefill-0", 6) == 0, "its owner lives, whatever the epoch"
        os.kill(child.pid, signal.SIGKILL)
        child.wait(30)
        mine = SegmentStore(TINY, "m", kv_config, "prefill-0", 6, "host")
        lease = mine.acquire([1], 1)
        assert SegmentStore.remove_orphans(folder, "prefill-1", 9) == 0
        assert SegmentStore.remove_orphans(folder, "prefill-0", 4) == 0, "a later epoch is not ours to judge"
        assert SegmentStore.remove_orphans(folder, "prefill-0", 6) == 3
        assert [path.name for path in folder.glob("*.kv")] == [lease.handle.location]
        mine.check()
        mine.close()
        assert list(folder.iterdir()) == []
    finally:
        watchdog.cancel()
        child.kill()
        child.wait()

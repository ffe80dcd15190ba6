"""The metadata store's contract, on the embedded server and on a real redis-server."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from winnow.errors import ConfigError
from winnow.metadata import MetadataUnavailable
from winnow.orchestration.metadata import RedisMetadata
from winnow.types import Fingerprint, WorkerInfo

from .conftest import RealRedis, Server, Snapshot

pytestmark = pytest.mark.timeout(30)

PRINT = Fingerprint(protocol=1, model="m" * 64, kv_layout="k" * 16, dtype="fp32", methods=("dense@1", "flexprefill@1"))


def worker(worker_id: str = "prefill-0", epoch: int = 1) -> WorkerInfo:
    return WorkerInfo(worker_id, epoch, ("prefill",), "127.0.0.1:5000", "host-a", PRINT, pid=42, metrics_address="127.0.0.1:9")


async def eventually(check: Callable[[], Awaitable[bool]], within_s: float) -> float:
    """Ask until it holds; seconds it took."""
    started = time.monotonic()
    while not await check():
        assert time.monotonic() - started < within_s, f"did not hold within {within_s} s"
        await asyncio.sleep(0.02)
    return time.monotonic() - started


# workers


async def test_a_registered_worker_is_read_back_whole(store: RedisMetadata) -> None:
    await store.register(worker("prefill-0", 7), ttl_s=5)
    await store.register(worker("decode-0", 8), ttl_s=5)
    assert sorted(await store.workers(), key=lambda w: w.worker_id) == [worker("decode-0", 8), worker("prefill-0", 7)]


async def test_a_worker_that_is_not_refreshed_disappears(store: RedisMetadata) -> None:
    await store.register(worker("a"), ttl_s=0.2)
    await store.register(worker("b"), ttl_s=5)
    assert len(await store.workers()) == 2

    async def only_b() -> bool:
        return [w.worker_id for w in await store.workers()] == ["b"]

    assert await eventually(only_b, 2) < 1.0


@pytest.mark.promise("R14")
async def test_an_older_epoch_never_replaces_a_newer_even_after_that_expired(store: RedisMetadata) -> None:
    old, new = await store.next_epoch("a"), await store.next_epoch("a")
    await store.register(worker("a", new), ttl_s=0.1)
    await store.register(worker("a", old), ttl_s=5)
    assert [w.epoch for w in await store.workers()] == [new]

    async def gone() -> bool:
        return not await store.workers()

    await eventually(gone, 2)
    await store.register(worker("a", old), ttl_s=5)  # it was paused past its time
    assert await store.workers() == []
    assert store.counters["stale_registration"] == 2


async def test_an_older_epoch_cannot_unregister_a_newer(store: RedisMetadata) -> None:
    await store.register(worker("a", 10), ttl_s=5)
    await store.unregister("a", 9)
    assert [w.epoch for w in await store.workers()] == [10]
    await store.unregister("a", 10)
    assert await store.workers() == []


@pytest.mark.parametrize(
    "entry",
    ["", "{", "[]", "null", '"text"', "[" * 5000, '{"worker_id": "a"}', '{"worker_id": "a", "epoch": "1"}', "x" * 100_000],
    ids=["empty", "cut", "list", "null", "text", "nested", "one field", "wrong type", "huge"],
)
async def test_a_malformed_entry_is_ignored_and_counted(store: RedisMetadata, admin: redis.Redis, entry: str) -> None:
    await store.register(worker("a", 1), ttl_s=5)
    await store.register(worker("b", 2), ttl_s=5)
    admin.set("winnow:1:worker:a", entry)
    assert [w.worker_id for w in await store.workers()] == ["b"]
    assert store.counters["malformed"] == 1


async def test_an_entry_under_another_workers_name_is_ignored(store: RedisMetadata, admin: redis.Redis) -> None:
    await store.register(worker("a", 1), ttl_s=5)
    await store.register(worker("b", 2), ttl_s=5)
    admin.set("winnow:1:worker:a", admin.get("winnow:1:worker:b") or "")
    assert [w.worker_id for w in await store.workers()] == ["b"]


async def test_keys_of_the_wrong_type_are_replaced_not_obeyed(store: RedisMetadata, admin: redis.Redis) -> None:
    before = await store.next_epoch("a")
    for key in ("epoch:a", "worker:a", "workers", "lease:x", "fence:x", "holders:p"):
        admin.delete(f"winnow:1:{key}")
        admin.rpush(f"winnow:1:{key}", "junk")
    assert await store.workers() == []
    assert await store.holders(["p"]) == {}
    assert await store.next_epoch("a") > before
    await store.register(worker("a", await store.next_epoch("a")), ttl_s=5)
    await store.add_holder("p", "a", 1, 64, ttl_s=5)
    token = await store.acquire_lease("x", "me", 5)
    assert token is not None and await store.renew_lease("x", "me", token, 5)
    assert [w.worker_id for w in await store.workers()] == ["a"]
    assert await store.holders(["p"]) == {"p": {"a": 1}}


# epochs


@pytest.mark.promise("R14")
async def test_epochs_grow_through_flush_restore_and_a_server_without_memory(
    store: RedisMetadata, server: Server, admin: redis.Redis
) -> None:
    epochs = [await store.next_epoch("a") for _ in range(50)]
    snapshot = Snapshot(admin)
    epochs += [await store.next_epoch("a") for _ in range(50)]
    snapshot.restore()
    epochs += [await store.next_epoch("a") for _ in range(50)]
    admin.flushall()
    other = RedisMetadata(server.url)  # a process that remembers nothing
    epochs += [await other.next_epoch("a") for _ in range(50)]
    await other.close()
    assert epochs == sorted(set(epochs))


async def test_a_counter_ahead_of_the_clock_still_grows(store: RedisMetadata, admin: redis.Redis) -> None:
    ahead = int(time.time() * 1e6) + 10**12  # a server whose clock was set back by days
    admin.set("winnow:1:epoch:a", str(ahead))
    assert await store.next_epoch("a") == ahead + 1


# holders


async def test_holders_are_found_per_prefix_and_run_out_apart(store: RedisMetadata) -> None:
    await store.add_holder("p1", "a", 3, 64, ttl_s=0.2)
    await store.add_holder("p1", "b", 4, 64, ttl_s=5)
    await store.add_holder("p2", "a", 3, 128, ttl_s=5)
    assert await store.holders(["p1", "p2", "p3"]) == {"p1": {"a": 3, "b": 4}, "p2": {"a": 3}}

    async def a_ran_out() -> bool:
        return await store.holders(["p1"]) == {"p1": {"b": 4}}

    await eventually(a_ran_out, 2)
    assert await store.holders([]) == {}


async def test_an_older_epoch_does_not_overwrite_a_holder(store: RedisMetadata) -> None:
    await store.add_holder("p", "a", 5, 64, ttl_s=5)
    await store.add_holder("p", "a", 4, 64, ttl_s=5)
    assert await store.holders(["p"]) == {"p": {"a": 5}}


@pytest.mark.parametrize("value", ["", "junk", "1 2", "-1 2 99999999999999999", "1 2 3 4", "٣ 64 99999999999999999"])
async def test_a_malformed_holder_is_ignored(store: RedisMetadata, admin: redis.Redis, value: str) -> None:
    await store.add_holder("p", "a", 5, 64, ttl_s=5)
    admin.hset("winnow:1:holders:p", "b", value)
    assert await store.holders(["p"]) == {"p": {"a": 5}}


# leases


async def test_a_lease_has_one_holder_until_it_is_released_or_runs_out(store: RedisMetadata) -> None:
    first = await store.acquire_lease("x", "a", 5)
    assert first is not None
    assert await store.acquire_lease("x", "b", 5) is None
    assert not await store.release_lease("x", "b", first)
    assert await store.release_lease("x", "a", first)
    second = await store.acquire_lease("x", "b", 0.15)
    assert second is not None and second > first
    assert not await store.renew_lease("x", "a", first, 5)

    async def b_ran_out() -> bool:
        return await store.acquire_lease("x", "a", 5) is not None

    await eventually(b_ran_out, 2)
    assert not await store.renew_lease("x", "b", second, 5)


async def test_renewing_keeps_a_lease_beyond_its_first_end(store: RedisMetadata) -> None:
    token = await store.acquire_lease("x", "a", 0.3)
    assert token is not None
    ends = time.monotonic() + 0.8
    while time.monotonic() < ends:
        assert await store.renew_lease("x", "a", token, 0.3)
        assert await store.acquire_lease("x", "b", 1) is None
        await asyncio.sleep(0.05)


async def test_asking_again_voids_the_holders_own_old_token(store: RedisMetadata) -> None:
    old, new = await store.acquire_lease("x", "a", 5), await store.acquire_lease("x", "a", 5)
    assert old is not None and new is not None and new > old
    assert not await store.renew_lease("x", "a", old, 5)
    assert await store.renew_lease("x", "a", new, 5)


@pytest.mark.promise("R12")
@pytest.mark.parametrize("seed", range(8))
async def test_a_stale_token_never_writes_whatever_the_order(
    store: RedisMetadata, server: Server, admin: redis.Redis, seed: int
) -> None:
    """Random grants, renewals, releases, expiries, flushes and old snapshots, against the owner of the bytes.

    The owner knows only the highest token it has seen; it must refuse everything granted before the grant it saw last.
    """
    print(f"seed {seed}")
    pick = random.Random(seed)
    stores = {name: RedisMetadata(server.url) for name in ("a", "b", "c")}  # as in processes of their own
    tokens: dict[str, int] = {}
    grants: list[tuple[int, str]] = []  # in the order they were made
    holder = ""  # by our own book; unknown ("?") after data was lost
    seen_by_owner = 0
    snapshot = Snapshot(admin)
    for _ in range(120):
        name = pick.choice("abc")
        action = pick.choice(["acquire", "acquire", "write", "write", "renew", "release", "expire", "flush", "save", "restore"])
        if action == "acquire":
            token = await stores[name].acquire_lease("x", name, 60)
            if holder != "?":
                assert (token is None) == (holder not in ("", name))
            if token is not None:
                assert not grants or token > grants[-1][0]
                grants.append((token, name))
                tokens[name], holder = token, name
        elif action == "write" and name in tokens:
            accepted = tokens[name] >= seen_by_owner
            later = [t for t, _ in grants if t > tokens[name]]
            if accepted:
                assert not [t for t in later if t <= seen_by_owner]
                seen_by_owner = tokens[name]
            else:
                assert later, "the holder of the newest grant was refused"
        elif action == "renew" and name in tokens:
            renewed = await stores[name].renew_lease("x", name, tokens[name], 60)
            if holder != "?":
                assert renewed == (holder == name)
        elif action == "release" and name in tokens:
            if await stores[name].release_lease("x", name, tokens[name]):
                holder = ""
        elif action == "expire":
            admin.delete("winnow:1:lease:x")
            holder = ""
        elif action == "flush":
            admin.flushall()
            holder = ""
        elif action == "save":
            snapshot = Snapshot(admin)
        elif action == "restore":
            snapshot.restore()
            holder = "?"
        if holder == "?":
            kept = admin.hget("winnow:1:lease:x", "holder")
            holder = (
                kept
                if kept and tokens.get(kept) == int(admin.hget("winnow:1:lease:x", "token") or 0)
                else ""
                if not kept
                else "?"
            )
    assert len(grants) > 10
    for made in stores.values():
        await made.close()


# a server that misbehaves (R11)


@pytest.mark.promise("R11")
async def test_a_stopped_server_fails_fast_and_comes_back_without_a_new_object(store: RedisMetadata, server: Server) -> None:
    await store.register(worker("a", 1), ttl_s=5)
    server.stop()
    started = time.monotonic()
    for _ in range(50):
        with pytest.raises(MetadataUnavailable):
            await store.workers()
    assert time.monotonic() - started < 1.0
    assert not await store.ping()
    server.start()

    async def answers() -> bool:
        try:
            return await store.workers() == []
        except MetadataUnavailable:
            return False

    assert await eventually(answers, 5) < 5.0
    await store.register(worker("a", 1), ttl_s=5)
    assert len(await store.workers()) == 1
    assert store.counters["unavailable"] > 0


@pytest.mark.promise("R11")
async def test_a_slow_server_costs_a_caller_at_most_the_timeout(store: RedisMetadata, admin: redis.Redis) -> None:
    await store.register(worker("a", 1), ttl_s=30)
    paused_at = time.monotonic()
    admin.client_pause(2000, all=True)
    with pytest.raises(MetadataUnavailable):
        await store.workers()
    assert time.monotonic() - paused_at < 1.0

    async def answers() -> bool:
        try:
            return [w.epoch for w in await store.workers()] == [1]
        except MetadataUnavailable:
            return False

    await eventually(answers, 7)
    assert 1.5 < time.monotonic() - paused_at < 2 + 5


@pytest.mark.promise("R11")
async def test_connections_closed_while_idle_are_not_noticed(store: RedisMetadata, admin: redis.Redis) -> None:
    await asyncio.gather(*(store.register(worker(f"w{i}", 1), ttl_s=30) for i in range(8)))  # several connections
    for client in admin.client_list():
        if client["id"] != str(admin.client_id()):
            admin.client_kill_filter(_id=client["id"])
    assert len(await store.workers()) == 8
    assert store.counters["unavailable"] == 0


@pytest.mark.promise("R11")
async def test_a_flush_forgets_scripts_and_data_and_nothing_breaks(store: RedisMetadata, admin: redis.Redis) -> None:
    await store.register(worker("a", 5), ttl_s=30)
    token = await store.acquire_lease("x", "me", 30)
    assert token is not None
    admin.flushall()
    admin.script_flush()
    assert await store.workers() == []
    assert not await store.renew_lease("x", "me", token, 30)
    again = await store.acquire_lease("x", "other", 30)
    assert again is not None and again > token
    await store.register(worker("a", 5), ttl_s=30)
    assert [w.epoch for w in await store.workers()] == [5]


async def test_a_server_that_is_full_or_read_only_reads_as_unavailable(store: RedisMetadata, admin: redis.Redis) -> None:
    admin.config_set("maxmemory", "1")
    admin.config_set("maxmemory-policy", "noeviction")
    with pytest.raises(MetadataUnavailable):
        await store.register(worker("a", 1), ttl_s=5)
    admin.config_set("maxmemory", "0")

    async def accepts() -> bool:
        try:
            await store.register(worker("a", 1), ttl_s=5)
        except MetadataUnavailable:
            return False
        return True

    await eventually(accepts, 5)


async def test_two_prefixes_do_not_see_each_other(server: Server) -> None:
    one, two = RedisMetadata(server.url, prefix="one"), RedisMetadata(server.url, prefix="two")
    await one.register(worker("a", 1), ttl_s=5)
    assert await two.workers() == []
    await one.close()
    await two.close()


# start-up


@pytest.mark.parametrize("url", ["", "localhost:6379", "http://localhost", "redis://localhost:notaport/0"])
def test_an_unreadable_url_names_the_setting(url: str) -> None:
    with pytest.raises(ConfigError, match=r"metadata\.redis_url"):
        RedisMetadata(url)


async def test_no_server_at_the_url_is_a_config_error_with_the_way_out(free_port: int, short_folder: Path) -> None:
    for url, reason in (
        (f"redis://user:hunter2@127.0.0.1:{free_port}/0", "connection refused"),
        (f"unix://{short_folder}/none.sock", "no such file"),
    ):
        made = RedisMetadata(url)
        with pytest.raises(ConfigError, match=reason) as caught:
            await made.check_reachable()
        assert "metadata.redis_url" in str(caught.value) and "embedded server" in str(caught.value)
        assert "hunter2" not in str(caught.value)
        await made.close()


async def test_a_wrong_password_is_a_config_error_that_hides_it(free_port: int, short_folder: Path) -> None:
    real = RealRedis(short_folder, port=free_port, password="right-password")
    real.start()
    try:
        good = RedisMetadata(real.url)
        await good.check_reachable()
        await good.close()
        for credentials in ("", ":wrong-password@"):
            bad = RedisMetadata(f"redis://{credentials}127.0.0.1:{free_port}/0")
            with pytest.raises(ConfigError, match="credentials") as caught:
                await bad.check_reachable()
            assert "wrong-password" not in str(caught.value)
            await bad.close()
    finally:
        real.stop()


async def test_worker_text_of_a_newer_version_with_unknown_fields_is_read(store: RedisMetadata, admin: redis.Redis) -> None:
    await store.register(worker("a", 1), ttl_s=30)
    entry = admin.get("winnow:1:worker:a")
    assert isinstance(entry, str)
    admin.set("winnow:1:worker:a", entry[:-1] + ', "zone": "eu"}')
    assert await store.workers() == [replace(worker("a", 1))]

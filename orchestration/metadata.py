"""The metadata store over Redis: the only file that imports redis.

Everything kept here is a hint. Redis may be slow, stopped, flushed or set back to an old snapshot: calls then raise
`MetadataUnavailable` within `timeout_s`, or find nothing; they never find something wrong that is believed (R11). The
connection is made anew by itself: after a failure calls fail at once for a moment, then one of them tries again, so that
a request is not made to wait `timeout_s` for each look-up while Redis is away.

Not supported: Redis Cluster (one server, a replica set behind one address, or the embedded server).
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
import urllib.parse
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, AuthorizationError, NoPermissionError, RedisError

from winnow.errors import ConfigError
from winnow.metadata import MetadataUnavailable
from winnow.orchestration import scripts
from winnow.orchestration.entries import worker_from_json, worker_to_json
from winnow.types import WorkerInfo

SCHEMA = 1  # part of every key: versions that do not understand each other do not meet
SCHEMES = ("redis", "rediss", "unix")
FENCE_LIFE_MS = 24 * 3600 * 1000  # of a lease's counter after its last grant; older ones are covered by the clock
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 1.0  # between tries while Redis is away; far below the 5 s of R11


class RedisMetadata:
    """`winnow.metadata.MetadataStore` over one Redis server. Belongs to one event loop.

    Attributes:
        counters: what was ignored or refused since the start: "malformed", "stale_registration", "unavailable".
    """

    def __init__(self, url: str, *, timeout_s: float = 0.5, prefix: str = "winnow") -> None:
        """No connection is made yet.

        Args:
            url: redis://, rediss:// (TLS) or unix://, with user and password where the server wants them.
            timeout_s: longest wait for one answer, connecting included, > 0.
            prefix: begins every key, so that several deployments can share one server.

        Raises:
            ConfigError: a URL that redis cannot read; the message masks the password.
        """
        if urllib.parse.urlsplit(url).scheme not in SCHEMES:
            raise ConfigError(f"metadata.redis_url: must begin with redis://, rediss:// or unix://, got {masked(url)}")
        try:
            self._redis = aioredis.Redis.from_url(
                url,
                decode_responses=True,
                encoding_errors="replace",  # foreign bytes become a malformed entry, not an exception
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 1),  # a connection the server closed while idle: once more on a new one
                max_connections=64,
            )
        except (ValueError, TypeError):
            raise ConfigError(
                f"metadata.redis_url: cannot be read: {masked(url)}; write redis://[user:password@]host:6379/0"
            ) from None
        self.url_masked = masked(url)
        self.counters: Counter[str] = Counter()
        self._timeout_s = timeout_s
        self._prefix = f"{prefix}:{SCHEMA}:"
        self._scripts: dict[str, Any] = {}
        self._pause_s = 0.0
        self._closed_until = 0.0  # monotonic; before it calls fail at once
        self._last_epoch: dict[str, int] = {}
        self._last_token: dict[str, int] = {}

    async def check_reachable(self) -> None:
        """For start-up: fail with the way out instead of running without metadata.

        Raises:
            ConfigError: nobody answers, or the server refuses the password.
        """
        away = "start it, correct the URL, or leave metadata.redis_url empty to use the embedded server"
        try:
            async with asyncio.timeout(max(2.0, 2 * self._timeout_s)):
                await self._answer(self._redis.ping())
                await self._run("epoch", scripts.NEXT_EPOCH, [self._prefix + "check"], [_now_us()])
                await self._answer(self._redis.delete(self._prefix + "check"))
        except (AuthenticationError, AuthorizationError, NoPermissionError):
            raise ConfigError(
                f"metadata.redis_url: {self.url_masked} refuses these credentials (it needs a user that may run EVALSHA, GET, "
                "SET, DEL, HGET, HSET, ZADD, PING on the keys winnow:*); put them into the URL as redis://user:password@host"
            ) from None
        except (RedisError, OSError, TimeoutError, ValueError) as error:
            reason = "did not answer in time" if isinstance(error, TimeoutError) else _reason(error)
            raise ConfigError(f"metadata.redis_url: no Redis at {self.url_masked} ({reason}); {away}") from None

    # epochs and workers

    async def next_epoch(self, worker_id: str) -> int:
        """See `MetadataStore.next_epoch`. In microseconds since 1970, or one more than the last."""
        floor = max(_now_us(), self._last_epoch.get(worker_id, 0) + 1)
        epoch = int(await self._call("epoch", scripts.NEXT_EPOCH, [self._key("epoch", worker_id)], [floor]))
        self._last_epoch[worker_id] = epoch
        return epoch

    async def register(self, info: WorkerInfo, ttl_s: float) -> None:
        """See `MetadataStore.register`. A refused older epoch is counted as "stale_registration"."""
        keys = [self._key("epoch", info.worker_id), self._key("worker", info.worker_id), self._prefix + "workers"]
        args = [info.worker_id, info.epoch, worker_to_json(info), _ms(ttl_s)]
        if not await self._call("register", scripts.REGISTER, keys, args):
            self.counters["stale_registration"] += 1

    async def unregister(self, worker_id: str, epoch: int) -> None:
        """Forget a worker at once, unless a newer epoch of it is known."""
        keys = [self._key("epoch", worker_id), self._key("worker", worker_id), self._prefix + "workers"]
        await self._call("unregister", scripts.UNREGISTER, keys, [worker_id, epoch])

    async def workers(self) -> list[WorkerInfo]:
        """See `MetadataStore.workers`. Entries that cannot be read are left out and counted as "malformed"."""
        ids: Sequence[str] = await self._call("live", scripts.LIVE_WORKERS, [self._prefix + "workers"], [])
        if not ids:
            return []
        entries: Sequence[str | None] = await self._guarded(lambda: self._redis.mget([self._key("worker", i) for i in ids]))
        found = []
        for worker_id, entry in zip(ids, entries, strict=True):
            if entry is None:  # ran out between the two calls
                continue
            try:
                info = worker_from_json(entry)
                if info.worker_id != worker_id:
                    raise ValueError("entry of another worker")
            except ValueError:
                self.counters["malformed"] += 1
                continue
            found.append(info)
        return found

    # holders of prefixes

    async def add_holder(self, prefix: str, worker_id: str, epoch: int, n_tokens: int, ttl_s: float) -> None:
        """See `MetadataStore.add_holder`. Each holder runs out by itself after `ttl_s`."""
        await self._call("add", scripts.ADD_HOLDER, [self._key("holders", prefix)], [worker_id, epoch, n_tokens, _ms(ttl_s)])

    async def holders(self, prefixes: list[str]) -> dict[str, dict[str, int]]:
        """See `MetadataStore.holders`. Prefixes nobody holds are left out."""
        if not prefixes:
            return {}
        answer = await self._call("holders", scripts.HOLDERS, [self._key("holders", p) for p in prefixes], [])
        found: dict[str, dict[str, int]] = {}
        for prefix, flat in zip(prefixes, answer, strict=True):
            live: dict[str, int] = {}
            for worker_id, value in zip(flat[::2], flat[1::2], strict=True):
                parts = value.split(" ")
                if len(parts) == 3 and all(p.isascii() and p.isdigit() for p in parts):
                    live[worker_id] = int(parts[0])
                else:
                    self.counters["malformed"] += 1
            if live:
                found[prefix] = live
        return found

    # leases

    async def acquire_lease(self, name: str, holder: str, ttl_s: float) -> int | None:
        """See `MetadataStore.acquire_lease`. Asking again as the same holder gives a new token and voids the old one."""
        floor = max(_now_us(), self._last_token.get(name, 0) + 1)
        keys = [self._key("lease", name), self._key("fence", name)]
        answer = await self._call("acquire", scripts.ACQUIRE_LEASE, keys, [holder, _ms(ttl_s), floor, FENCE_LIFE_MS])
        if answer is None:
            return None
        self._last_token[name] = int(answer)
        return int(answer)

    async def renew_lease(self, name: str, holder: str, token: int, ttl_s: float) -> bool:
        """See `MetadataStore.renew_lease`."""
        return bool(await self._call("renew", scripts.RENEW_LEASE, [self._key("lease", name)], [holder, token, _ms(ttl_s)]))

    async def release_lease(self, name: str, holder: str, token: int) -> bool:
        """False when the lease was not held under this token."""
        answer = bool(await self._call("release", scripts.RELEASE_LEASE, [self._key("lease", name)], [holder, token]))
        self._last_token.pop(name, None)
        return answer

    # connection

    async def ping(self) -> bool:
        """True while the store answers within `timeout_s`; never raises. Always asks, also during a pause."""
        try:
            return bool(await self._guarded(lambda: self._answer(self._redis.ping()), during_pause=True))
        except MetadataUnavailable:
            return False

    async def close(self) -> None:
        """Close all connections. The object can still be used; it connects again."""
        await self._redis.aclose()

    def _key(self, kind: str, name: str) -> str:
        return f"{self._prefix}{kind}:{name}"

    async def _call(self, name: str, script: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        return await self._guarded(lambda: self._run(name, script, keys, args))

    async def _run(self, name: str, script: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        registered = self._scripts.get(name)
        if registered is None:
            registered = self._scripts[name] = self._redis.register_script(script)
        return await registered(keys=keys, args=args)  # EVALSHA; loads the script again where the server forgot it

    @staticmethod
    async def _answer(command: Any) -> Any:
        return await command  # redis-py types its commands as "maybe awaitable"

    async def _guarded(self, command: Callable[[], Awaitable[Any]], *, during_pause: bool = False) -> Any:
        if not during_pause and time.monotonic() < self._closed_until:
            raise MetadataUnavailable(f"{self.url_masked} is away; next try in a moment")
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await command()
        except (RedisError, OSError, TimeoutError) as error:
            self.counters["unavailable"] += 1
            self._pause_s = min(max(_FIRST_PAUSE_S, 2 * self._pause_s), _LONGEST_PAUSE_S)
            self._closed_until = time.monotonic() + self._pause_s
            raise MetadataUnavailable(f"{self.url_masked}: {_reason(error)}") from error
        self._pause_s = self._closed_until = 0.0
        return answer


def masked(url: str) -> str:
    """The URL without its password and query, fit for messages and logs."""
    parts = urllib.parse.urlsplit(url)
    _, at, host = parts.netloc.rpartition("@")
    return urllib.parse.urlunsplit((parts.scheme, ("***@" if at else "") + host, parts.path, "", ""))


def _now_us() -> int:
    return time.time_ns() // 1000


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _reason(error: BaseException) -> str:
    """A few words a reader can act on; redis-py's own texts may quote the address and its user."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, socket.gaierror):
            return "host name unknown"
        if isinstance(link, TimeoutError):
            return "timed out"
        if isinstance(link, OSError) and link.errno:
            return os.strerror(link.errno).lower()
        link = link.__cause__ or link.__context__
    return type(error).__name__

"""The gateway as one object: put together, started, drained, stopped."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from winnow import telemetry
from winnow.config import WinnowConfig
from winnow.index.layout import SegmentLayout
from winnow.metadata import MetadataStore
from winnow.services.common.auth import PUBLIC, resolve_secret
from winnow.services.common.links import Links
from winnow.services.common.server import RpcServer, build_server
from winnow.services.gateway.admission import Admission
from winnow.services.gateway.calls import Calls
from winnow.services.gateway.generate import Generator
from winnow.services.gateway.hops import Hops
from winnow.services.gateway.methods import Methods, versions
from winnow.services.gateway.rank import RankRunner
from winnow.services.gateway.router import Router
from winnow.services.gateway.servicer import WinnowServicer
from winnow.services.gateway.sessions import Sessions
from winnow.services.gateway.status import StatusReport
from winnow.services.gateway.validation import Served
from winnow.types import Fingerprint, WorkerInfo
from winnow.wire import PROTOCOL
from winnow.workers.model.loader import model_name, resolve_dtype
from winnow.workers.model.spec import ModelSpec
from winnow.workers.model.tokenizer import Tokenizer

log = telemetry.get_logger("gateway")


class Gateway:
    """The public door. Make, start and stop it inside one event loop.

    Args:
        config: everything.
        metadata: where workers announce themselves; None = only the static ones.
        bundle: what `winnow.workers.model.loader.load_tokenizer(config.model.source)` returned.
        workers: addresses (host:port) or infos of workers that are always there (single-process mode).
        poll_s: seconds between looks at the workers.
    """

    def __init__(
        self,
        config: WinnowConfig,
        metadata: MetadataStore | None,
        bundle: tuple[Tokenizer, ModelSpec, str],
        *,
        workers: Sequence[WorkerInfo | str] = (),
        poll_s: float | None = None,
    ) -> None:
        tokenizer, spec, fingerprint = bundle
        self._config = config
        dtype = resolve_dtype(config.model.dtype, config.model.device)
        served = Served(config.model.name or model_name(config.model.source), spec, dtype, fingerprint)
        layout = SegmentLayout(spec.n_layers, spec.n_kv_heads, spec.head_size, dtype)
        expect = Fingerprint(PROTOCOL, fingerprint, layout.digest(), dtype, 0, versions())
        self._secret = resolve_secret(config.auth)
        self._links = Links(config, self._secret)
        every = poll_s or min(1.0, config.metadata.worker_ttl_s / 5)
        self.router = Router(self._links, expect, metadata, workers, every)
        self.admission = Admission(config.gateway.max_inflight, config.gateway.max_queue)
        self.calls = Calls()
        self._hops = Hops(self._links, self.router, config)
        self.sessions = Sessions(self._hops)
        self._servicer = WinnowServicer(
            served,
            tokenizer,
            self.admission,
            self.calls,
            Methods(config, served),
            Generator(self._hops, self.router, self._links, tokenizer, _tails_mapped(config)),
            RankRunner(self._hops, self._links),
            self.sessions,
            StatusReport(config, served, self.router, self.admission, self.calls, metadata is not None),
            config.gateway.max_stream_buffer,
        )
        self._server: RpcServer | None = None

    async def start(self) -> str:
        """Bind, look for workers, then say SERVING. Returns host:port.

        Raises:
            ConfigError: the port is in use, or a public bind without TLS and auth.
        """
        server = build_server({"Winnow": self._servicer}, self._config, audience=PUBLIC, secret=self._secret)
        await self.router.start()
        address = await server.start()
        await server.set_serving(True)
        await server.set_serving(True, "winnow.v1.Winnow")
        self._server = server
        log.info("gateway serves", address=address)
        return address

    async def drain(self, grace_s: float | None = None) -> None:
        """Leave in order (promise R18): health says NOT_SERVING, new requests get UNAVAILABLE, running ones finish within
        grace_s seconds (None = gateway.drain_grace_s), the rest end with UNAVAILABLE, then everything stops."""
        grace = self._config.gateway.drain_grace_s if grace_s is None else grace_s
        log.info("draining", running=len(self.calls), grace_s=grace)
        if self._server is not None:
            await self._server.leave()
        await self.calls.drain(grace)
        await self.stop()

    async def stop(self) -> None:
        """Stop now: running requests end with UNAVAILABLE, sessions and leases are given back. May be called twice."""
        await self.calls.drain(0)
        if self._server is not None:
            server, self._server = self._server, None
            await server.leave()
            await server.stop(1.0)
        await self.router.stop()
        self.sessions.close_all()
        await self._hops.settle()
        await self._links.close()


def _tails_mapped(config: WinnowConfig) -> bool:
    """Decode workers map segments instead of copying them: on CPU, unless streams are demanded."""
    device = config.model.device
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    return on_cpu and config.kv.transport != "stream"

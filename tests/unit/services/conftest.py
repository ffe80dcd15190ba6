"""A real server on a free loopback port around any servicers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import pytest

from winnow.config import AuthConfig, GatewayConfig, WinnowConfig
from winnow.services.common.auth import INTERNAL
from winnow.services.common.server import RpcServer, build_server

SECRET = "a-signing-secret-for-tests-only-0123456789"


@pytest.fixture
def secret() -> str:
    return SECRET


@pytest.fixture
def config() -> WinnowConfig:
    return WinnowConfig(
        gateway=GatewayConfig(port=0, default_deadline_s=2.0, max_deadline_s=4.0, max_message_bytes=64 << 10),
        auth=AuthConfig(secret=SECRET),
    )


Serve = Callable[..., Awaitable[RpcServer]]


@pytest.fixture
async def serve(config: WinnowConfig) -> AsyncIterator[Serve]:
    started: list[RpcServer] = []

    async def start(servicers: Mapping[str, Any], **options: Any) -> RpcServer:
        options.setdefault("audience", INTERNAL)
        server = build_server(servicers, options.pop("config", config), **options)
        await server.start()
        started.append(server)
        return server

    yield start
    for server in started:
        await server.stop(0)

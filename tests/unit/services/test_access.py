"""Who gets in (R28): every call of every service against every kind of bad token, and safe binding."""

from __future__ import annotations

import base64
import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import jwt
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from winnow.config import AuthConfig, GatewayConfig, WinnowConfig
from winnow.errors import ConfigError
from winnow.proto.v1 import internal_pb2, winnow_pb2
from winnow.services.common import auth
from winnow.services.common.server import build_server

PUBLIC_SERVICES = ["Winnow"]
INTERNAL_SERVICES = [s for s in internal_pb2.DESCRIPTOR.services_by_name]
OPEN = {"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"}
REFLECTION = "grpc.reflection.v1alpha.ServerReflection"


class Untouched:
    """Any servicer: every method counts and answers nothing."""

    calls = 0

    def __getattr__(self, name: str) -> Any:
        async def handler(request: Any, context: Any) -> Any:
            Untouched.calls += 1

        return handler


def unsigned(audience: str) -> str:
    def part(value: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    return f"{part({'alg': 'none', 'typ': 'JWT'})}.{part({'aud': audience, 'sub': 'x', 'scope': 'admin', 'exp': 9999999999})}."


def bad_tokens(secret: str, audience: str) -> dict[str, tuple[str | None, grpc.StatusCode]]:
    other = auth.PUBLIC if audience == auth.INTERNAL else auth.INTERNAL
    everything = (*auth.PUBLIC_SCOPES, "admin", auth.INTERNAL_SCOPE)
    closed, low = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
    no_exp = jwt.encode({"aud": audience, "sub": "x", "scope": "admin internal"}, secret, algorithm="HS256")
    other_alg = jwt.encode({"aud": audience, "sub": "x", "exp": 9999999999}, secret * 2, algorithm="HS512")
    return {
        "none": (None, closed),
        "empty": ("", closed),
        "garbage": ("garbage", closed),
        "three parts": ("a.b.c", closed),
        "expired": (auth.mint(secret, audience=audience, scopes=everything, ttl_s=-1), closed),
        "foreign key": (auth.mint(secret[::-1], audience=audience, scopes=everything), closed),
        "wrong audience": (auth.mint(secret, audience=other, scopes=everything), closed),
        "alg none": (unsigned(audience), closed),
        "other alg": (other_alg, closed),
        "no expiry": (no_exp, closed),
        "no scope": (auth.mint(secret, audience=audience, scopes=()), low),
        "foreign scope": (auth.mint(secret, audience=audience, scopes=("nothing",)), low),
    }


async def status_of(channel: grpc.aio.Channel, rpc: str, token: str | None) -> grpc.StatusCode:
    """The status of a call made with raw bytes, whatever its kind: a bidi stream speaks to all four."""
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    call = channel.stream_stream(rpc)(metadata=metadata, timeout=10)
    try:
        await call.write(b"\xff")
        await call.done_writing()
    except grpc.aio.AioRpcError as error:  # the server may refuse before the first message is out
        return error.code()
    return await call.code()


@pytest.mark.promise("R28")
@pytest.mark.parametrize(("services", "audience"), [(PUBLIC_SERVICES, auth.PUBLIC), (INTERNAL_SERVICES, auth.INTERNAL)])
async def test_no_call_lets_anyone_in_without_a_good_token(services: list[str], audience: str, serve, secret) -> None:
    Untouched.calls = 0
    server = await serve({name: Untouched() for name in services}, audience=audience)
    names = [f"winnow.v1.{name}" for name in services]
    rpcs = [*auth.methods_of(names), *auth.methods_of([REFLECTION])]
    assert len(rpcs) > len(services)
    wrong = {}
    async with grpc.aio.insecure_channel(server.address) as channel:
        for label, (token, expected) in bad_tokens(secret, audience).items():
            for rpc in rpcs:
                got = await status_of(channel, rpc, token)
                if got is not expected:
                    wrong[rpc, label] = got
    assert wrong == {}
    assert Untouched.calls == 0


@pytest.mark.promise("R28")
async def test_a_public_token_never_opens_an_internal_service_and_each_scope_opens_only_its_calls(serve, secret) -> None:
    server = await serve({"Winnow": Untouched()}, audience=auth.PUBLIC)
    async with grpc.aio.insecure_channel(server.address) as channel:
        for rpc in auth.methods_of(["winnow.v1.Winnow"]):
            for scope in (*auth.PUBLIC_SCOPES, "admin"):
                got = await status_of(channel, rpc, auth.mint(secret, scopes=(scope,)))
                allowed = scope in auth.RULES[rpc].scopes
                # an allowed call gets as far as decoding the bad byte
                assert got is (grpc.StatusCode.INVALID_ARGUMENT if allowed else grpc.StatusCode.PERMISSION_DENIED), (rpc, scope)


@pytest.mark.promise("R28")
async def test_only_liveness_is_open(serve, secret) -> None:
    server = await serve({"Winnow": Untouched()}, audience=auth.PUBLIC)
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        reply = await stub.Check(health_pb2.HealthCheckRequest())
        assert reply.status == health_pb2.HealthCheckResponse.NOT_SERVING  # until the process says otherwise
        await server.set_serving(True)
        reply = await stub.Check(health_pb2.HealthCheckRequest())
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    assert {rpc for rpc, rule in auth.RULES.items() if rule.is_open} == OPEN


@pytest.mark.promise("R28")
async def test_every_call_has_a_rule_and_one_without_is_not_served(config: WinnowConfig) -> None:
    names = [f"winnow.v1.{n}" for n in (*winnow_pb2.DESCRIPTOR.services_by_name, *INTERNAL_SERVICES)]
    auth.require_rules([*names, "grpc.health.v1.Health", REFLECTION])
    fewer = {rpc: rule for rpc, rule in auth.RULES.items() if rpc != "/winnow.v1.Winnow/Cancel"}
    with pytest.raises(ConfigError, match=r"/winnow\.v1\.Winnow/Cancel"):
        build_server({"Winnow": Untouched()}, config, rules=fewer)


@pytest.mark.promise("R28")
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org"])
async def test_a_bind_others_can_reach_is_refused_without_tls_and_auth(host: str, tmp_path: Path, secret: str) -> None:
    with pytest.raises(ConfigError, match=r"gateway\.tls_cert and gateway\.tls_key and auth\.enabled=true"):
        build_server({}, WinnowConfig(gateway=GatewayConfig(host=host, port=0), auth=AuthConfig(enabled=False)))
    with pytest.raises(ConfigError, match=r"needs gateway\.tls_cert and gateway\.tls_key;"):
        build_server({}, WinnowConfig(gateway=GatewayConfig(host=host, port=0), auth=AuthConfig(secret=secret)))
    both = GatewayConfig(host=host, port=0, tls_cert="c.pem", tls_key="k.pem")
    with pytest.raises(ConfigError, match=r"needs auth\.enabled=true"):
        build_server({}, WinnowConfig(gateway=both, auth=AuthConfig(enabled=False)))


@pytest.mark.promise("R28")
def test_the_default_bind_is_loopback_with_auth_on() -> None:
    assert (GatewayConfig().host, AuthConfig().enabled) == ("127.0.0.1", True)


@pytest.mark.promise("R28")
async def test_mutual_tls_lets_only_our_certificates_in(serve, secret, config, tmp_path: Path) -> None:
    ours, theirs = trustme.CA(), trustme.CA()
    server_cert = ours.issue_cert("localhost", "127.0.0.1")
    (tmp_path / "cert.pem").write_bytes(server_cert.cert_chain_pems[0].bytes())
    (tmp_path / "key.pem").write_bytes(server_cert.private_key_pem.bytes())
    ours.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    tls = GatewayConfig(
        port=0, tls_cert=str(tmp_path / "cert.pem"), tls_key=str(tmp_path / "key.pem"), tls_client_ca=str(tmp_path / "ca.pem")
    )
    Untouched.calls = 0
    server = await serve({"Winnow": Untouched()}, audience=auth.PUBLIC, config=config.model_copy(update={"gateway": tls}))

    async def call(client: trustme.LeafCert | None) -> grpc.StatusCode:
        pair = {} if client is None else {
            "private_key": client.private_key_pem.bytes(), "certificate_chain": client.cert_chain_pems[0].bytes(),
        }  # fmt: skip
        credentials = grpc.ssl_channel_credentials(ours.cert_pem.bytes(), **pair)
        async with grpc.aio.secure_channel(f"localhost:{server.port}", credentials) as channel:
            return await status_of(channel, "/winnow.v1.Winnow/GetStatus", auth.mint(secret))

    assert await call(None) is grpc.StatusCode.UNAVAILABLE
    assert await call(theirs.issue_cert("client")) is grpc.StatusCode.UNAVAILABLE
    assert await call(ours.issue_cert("client")) is grpc.StatusCode.INVALID_ARGUMENT
    assert Untouched.calls == 0


async def test_a_port_in_use_names_the_setting_and_the_way_out(serve, config) -> None:
    server = await serve({"Winnow": Untouched()}, audience=auth.PUBLIC)
    with pytest.raises(ConfigError, match=rf"gateway\.port: {server.port} on 127\.0\.0\.1 .* WINNOW_GATEWAY__PORT=0"):
        build_server({"Winnow": Untouched()}, config, port=server.port)


def test_a_secret_is_made_once_kept_private_and_agreed_on_by_all(tmp_path: Path) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(auth.resolve_secret(AuthConfig(), tmp_path / "run"))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found[0]) >= auth.MIN_SECRET_CHARS
    assert stat.S_IMODE(os.stat(tmp_path / "run" / "secret").st_mode) == 0o600
    assert os.listdir(tmp_path / "run") == ["secret"]


def test_a_short_secret_is_refused_without_being_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        auth.resolve_secret(AuthConfig(secret="hunter2"))
    assert "hunter2" not in str(caught.value) and "32" in str(caught.value)

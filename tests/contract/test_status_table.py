"""Every refused input has the documented code (R24): one case per field and limit, against a real gateway.

Each row changes a request that succeeds. Rows that say OK stand at the limit itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from winnow import telemetry
from winnow.config import TelemetryConfig
from winnow.proto.v1 import common_pb2, winnow_pb2
from winnow.services.common.auth import methods_of, mint

SECRET = "a-signing-secret-for-tests-only-0123456789"
CANARY = "canary-9c1e"
NAN, INF = float("nan"), float("inf")
INT32_MAX, INT64_MIN = 2**31 - 1, -(2**63)

OK, BAD, LONG, MISSING, UNFIT = "OK", "INVALID_ARGUMENT", "OUT_OF_RANGE", "NOT_FOUND", "FAILED_PRECONDITION"
Change = Callable[[Any], None]


def put(path: str, value: Any) -> Change:
    """Set a field given as a dotted path."""

    def change(request: Any) -> None:
        *parents, last = path.split(".")
        for name in parents:
            request = getattr(request, name)
        if isinstance(value, list):
            del getattr(request, last)[:]
            getattr(request, last).extend(value)
        elif isinstance(value, dict):
            getattr(request, last).clear()
            getattr(request, last).update(value)
        else:
            setattr(request, last, value)

    return change


def messages(*pairs: tuple[str, str]) -> Change:
    def change(request: Any) -> None:
        request.prompt = ""
        del request.messages[:]
        request.messages.extend(winnow_pb2.Message(role=r, content=c) for r, c in pairs)

    return change


def both(*changes: Change) -> Change:
    def change(request: Any) -> None:
        for one in changes:
            one(request)

    return change


S = "sampling."
GENERATE: list[tuple[str, Change, str, str]] = [
    ("as it is", lambda r: None, OK, ""),
    ("model: named", put("model", "tiny"), OK, ""),
    ("model: unknown", put("model", "gpt"), MISSING, "model"),
    ("model: 600 characters", put("model", "m" * 600), BAD, "model"),
    ("prompt: empty", put("prompt", ""), BAD, "prompt"),
    ("prompt: one character", put("prompt", "x"), OK, ""),
    ("prompt and messages", put("messages", [winnow_pb2.Message(role="user", content="x")]), BAD, "exactly one"),
    ("prompt and question", put("question", "x"), BAD, "exactly one"),
    ("question without session", both(put("prompt", ""), put("question", "x")), BAD, "session_id"),
    ("session without question", both(put("prompt", ""), put("session_id", "s")), BAD, "question"),
    ("session_id: unknown", both(put("prompt", ""), put("question", "x"), put("session_id", "s")), MISSING, "session_id"),
    ("session_id: 65 characters", both(put("prompt", ""), put("question", "x"), put("session_id", "s" * 65)), BAD, "session_id"),
    ("messages: user", messages(("user", "x")), OK, ""),
    ("messages: bad role", messages(("robot", "x")), BAD, "messages[0].role"),
    ("messages: empty role", messages(("", "x")), BAD, "messages[0].role"),
    ("messages: earlier ones empty", messages(*[("user", "")] * 19, ("user", "x")), OK, ""),
    ("messages: last one empty", messages(("user", "x"), ("user", " ")), BAD, "messages"),
    ("messages: 1024 are not too many", messages(*[("user", "")] * 1023, ("user", "x")), LONG, "max_tokens"),
    ("messages: 1025", messages(*[("user", "x")] * 1025), BAD, "messages"),
    ("temperature -0.1", put(S + "temperature", -0.1), BAD, "sampling.temperature"),
    ("temperature 0", put(S + "temperature", 0.0), OK, ""),
    ("temperature 10", put(S + "temperature", 10.0), OK, ""),
    ("temperature 10.1", put(S + "temperature", 10.1), BAD, "sampling.temperature"),
    ("temperature NaN", put(S + "temperature", NAN), BAD, "sampling.temperature"),
    ("temperature inf", put(S + "temperature", INF), BAD, "sampling.temperature"),
    ("top_p 0", put(S + "top_p", 0.0), BAD, "sampling.top_p"),
    ("top_p 0.001", put(S + "top_p", 0.001), OK, ""),
    ("top_p 1", put(S + "top_p", 1.0), OK, ""),
    ("top_p 1.01", put(S + "top_p", 1.01), BAD, "sampling.top_p"),
    ("top_p NaN", put(S + "top_p", NAN), BAD, "sampling.top_p"),
    ("top_k -1", put(S + "top_k", -1), BAD, "sampling.top_k"),
    ("top_k 0", put(S + "top_k", 0), OK, ""),
    ("top_k 1048576", put(S + "top_k", 1 << 20), OK, ""),
    ("top_k 1048577", put(S + "top_k", (1 << 20) + 1), BAD, "sampling.top_k"),
    ("min_p -0.1", put(S + "min_p", -0.1), BAD, "sampling.min_p"),
    ("min_p 1", put(S + "min_p", 1.0), OK, ""),
    ("min_p 1.1", put(S + "min_p", 1.1), BAD, "sampling.min_p"),
    ("min_p NaN", put(S + "min_p", NAN), BAD, "sampling.min_p"),
    ("seed 0", put(S + "seed", 0), OK, ""),
    ("seed -1", put(S + "seed", -1), BAD, "sampling.seed"),
    ("seed smallest", put(S + "seed", INT64_MIN), BAD, "sampling.seed"),
    ("seed largest", put(S + "seed", 2**63 - 1), OK, ""),
    ("max_tokens 0", put(S + "max_tokens", 0), BAD, "sampling.max_tokens"),
    ("max_tokens -1", put(S + "max_tokens", -1), BAD, "sampling.max_tokens"),
    ("max_tokens 1", put(S + "max_tokens", 1), OK, ""),
    ("max_tokens 1048577", put(S + "max_tokens", (1 << 20) + 1), BAD, "sampling.max_tokens"),
    ("context - 1", put(S + "max_tokens", 2048 - 12), OK, ""),
    ("context", put(S + "max_tokens", 2048 - 11), OK, ""),
    ("context + 1", put(S + "max_tokens", 2048 - 10), LONG, "11 tokens"),
    ("prompt alone too long", put("prompt", "x" * 5000), LONG, "5000 tokens"),
    ("stop: 16", put(S + "stop", ["z"] * 16), OK, ""),
    ("stop: 17", put(S + "stop", ["z"] * 17), BAD, "sampling.stop"),
    ("stop: empty string", put(S + "stop", [""]), BAD, "sampling.stop"),
    ("stop: 256 characters", put(S + "stop", ["z" * 256]), OK, ""),
    ("stop: 257 characters", put(S + "stop", ["z" * 257]), BAD, "sampling.stop"),
    ("logprobs -1", put(S + "logprobs", -1), BAD, "sampling.logprobs"),
    ("logprobs 20", put(S + "logprobs", 20), OK, ""),
    ("logprobs 21", put(S + "logprobs", 21), BAD, "sampling.logprobs"),
    ("prefill: dense", put("prefill.name", "dense"), OK, ""),
    ("prefill: unknown", put("prefill.name", "nope"), MISSING, "prefill method 'nope'"),
    ("prefill: 65 characters", put("prefill.name", "n" * 65), BAD, "prefill.name"),
    ("prefill: unknown param", both(put("prefill.name", "dense"), put("prefill.params", {"k": "1"})), BAD, "'k'"),
    ("prefill: params without name", put("prefill.params", {"k": "1"}), BAD, "prefill.params"),
    ("prefill: 33 params", put("prefill.params", {f"k{i}": "1" for i in range(33)}), BAD, "prefill.params"),
    ("prefill: NaN param", both(put("prefill.name", "flexprefill"), put("prefill.params", {"gamma": "nan"})), BAD, "gamma"),
    ("prefill: param too small", both(put("prefill.name", "flexprefill"), put("prefill.params", {"gamma": "0"})), BAD, "gamma"),
    ("prefill: param: 257", both(put("prefill.name", "flexprefill"), put("prefill.params", {"k": "1" * 257})), BAD, "params[k]"),
    ("decode: retrieval-attention", put("decode.name", "retrieval-attention"), OK, ""),
    ("decode: unknown", put("decode.name", "nope"), MISSING, "decode method 'nope'"),
    ("decode: a prefill method", put("decode.name", "flexprefill"), MISSING, "decode method"),
    ("reducer: specpc", put("reducer.name", "specpc"), OK, ""),
    ("reducer: unknown", put("reducer.name", "nope"), MISSING, "draft scorer 'nope'"),
    ("reducer: params without name", put("reducer.params", {"k": "1"}), BAD, "reducer.params"),
    ("request_id: 64", put("request_id", "r" * 64), OK, ""),
    ("request_id: 65", put("request_id", "r" * 65), BAD, "request_id"),
    ("request_id: space", put("request_id", "a b"), BAD, "request_id"),
    ("request_id: newline", put("request_id", "a\nb"), BAD, "request_id"),
    ("answer_prefix with prompt", put("answer_prefix", "x"), BAD, "answer_prefix"),
    ("answer_prefix with messages", both(messages(("user", "x")), put("answer_prefix", "y")), OK, ""),
    ("answer_prefix: 4097", both(messages(("user", "x")), put("answer_prefix", "y" * 4097)), BAD, "answer_prefix"),
]  # fmt: skip


def documents(*ids: str, text: str = "x") -> Change:
    return put("documents", [common_pb2.Document(doc_id=i, text=text) for i in ids])


RANK: list[tuple[str, Change, str, str]] = [
    ("as it is", lambda r: None, OK, ""),
    ("model: unknown", put("model", "gpt"), MISSING, "model"),
    ("query: empty", put("query", ""), BAD, "query"),
    ("query: 32768", put("query", "q" * 32768), OK, ""),
    ("query: 32769", put("query", "q" * 32769), BAD, "query"),
    ("documents: none", documents(), BAD, "documents"),
    ("documents: 4096", documents(*map(str, range(4096))), OK, ""),
    ("documents: 4097", documents(*map(str, range(4097))), BAD, "documents"),
    ("documents: same id", documents("a", "b", "a"), BAD, "documents[2].doc_id"),
    ("documents: empty id", documents(""), BAD, "documents[0].doc_id"),
    ("documents: id of 512", documents("d" * 512), OK, ""),
    ("documents: id of 513", documents("d" * 513), BAD, "documents[0].doc_id"),
    ("documents: empty text", documents("a", text=""), OK, ""),
    ("documents: 1 MiB", documents("a", text="x" * (1 << 20)), OK, ""),
    ("documents: 1 MiB + 1", documents("a", text="x" * ((1 << 20) + 1)), BAD, "documents[0].text"),
    ("documents: 1 MiB + 1 in bytes", documents("a", text="é" * ((1 << 19) + 1)), BAD, "documents[0].text"),
    ("ranker: unknown", put("ranker.name", "nope"), MISSING, "ranker 'nope'"),
    ("top_n -1", put("top_n", -1), BAD, "top_n"),
    ("top_n 0", put("top_n", 0), OK, ""),
    ("top_n beyond", put("top_n", INT32_MAX), OK, ""),
    ("request_id: bad", put("request_id", "a/b"), BAD, "request_id"),
]
OPEN: list[tuple[str, Change, str, str]] = [
    ("as it is", lambda r: None, OK, ""),
    ("model: unknown", put("model", "gpt"), MISSING, "model"),
    ("text: empty", put("text", ""), BAD, "text"),
    ("text: too long", put("text", "x" * 3000), LONG, "context is 2048"),
    ("prefill: unknown", put("prefill.name", "nope"), MISSING, "prefill method"),
    ("idle_timeout_s 0", put("idle_timeout_s", 0.0), OK, ""),
    ("idle_timeout_s 0.5", put("idle_timeout_s", 0.5), BAD, "idle_timeout_s"),
    ("idle_timeout_s 1", put("idle_timeout_s", 1.0), OK, ""),
    ("idle_timeout_s 86400", put("idle_timeout_s", 86400.0), OK, ""),
    ("idle_timeout_s 86401", put("idle_timeout_s", 86401.0), BAD, "idle_timeout_s"),
    ("idle_timeout_s -1", put("idle_timeout_s", -1.0), BAD, "idle_timeout_s"),
    ("idle_timeout_s NaN", put("idle_timeout_s", NAN), BAD, "idle_timeout_s"),
]
CLOSE: list[tuple[str, Change, str, str]] = [
    ("session_id: empty", put("session_id", ""), BAD, "session_id"),
    ("session_id: unknown", put("session_id", "x" * 64), MISSING, "session_id"),
    ("session_id: 65", put("session_id", "x" * 65), BAD, "session_id"),
]
CANCEL: list[tuple[str, Change, str, str]] = [
    ("request_id: empty", put("request_id", ""), BAD, "request_id"),
    ("request_id: bad", put("request_id", "a b"), BAD, "request_id"),
    ("request_id: unknown", put("request_id", "x"), MISSING, "request_id"),
]
LIST: list[tuple[str, Change, str, str]] = [
    ("slot: all", put("slot", ""), OK, ""),
    ("slot: decode", put("slot", "decode"), OK, ""),
    ("slot: unknown", put("slot", "nope"), BAD, "slot"),
]
TABLES: dict[str, tuple[Any, list[tuple[str, Change, str, str]]]] = {
    "Generate": (winnow_pb2.GenerateRequest(prompt="hello world", sampling={"max_tokens": 8}), GENERATE),
    "Rank": (winnow_pb2.RankRequest(query="q", documents=[common_pb2.Document(doc_id="a", text="x")]), RANK),
    "OpenSession": (winnow_pb2.OpenSessionRequest(text="some text"), OPEN),
    "CloseSession": (winnow_pb2.CloseSessionRequest(), CLOSE),
    "Cancel": (winnow_pb2.CancelRequest(), CANCEL),
    "ListMethods": (winnow_pb2.ListMethodsRequest(), LIST),
    "GetCapabilities": (winnow_pb2.GetCapabilitiesRequest(), [("as it is", lambda r: None, OK, "")]),
    "ListModels": (winnow_pb2.ListModelsRequest(), [("as it is", lambda r: None, OK, "")]),
    "ListSessions": (winnow_pb2.ListSessionsRequest(), [("as it is", lambda r: None, OK, "")]),
    "GetStatus": (winnow_pb2.GetStatusRequest(), [("as it is", lambda r: None, OK, "")]),
}


async def send(channel: grpc.aio.Channel, rpc: str, raw: bytes, timeout_s: float = 20) -> tuple[str, str]:
    """(status, text) of a call with raw bytes; a two-way stream speaks to every kind of call."""
    call = channel.stream_stream(rpc)(metadata=(("authorization", f"Bearer {mint(SECRET)}"),), timeout=timeout_s)
    try:
        await call.write(raw)
        await call.done_writing()
    except grpc.aio.AioRpcError as error:
        return error.code().name, error.details() or ""

    async def drain() -> None:
        while await call.read() is not grpc.aio.EOF:
            pass

    try:
        await drain()
    except grpc.aio.AioRpcError as error:
        return error.code().name, error.details() or ""
    return (await call.code()).name, await call.details() or ""


@pytest.mark.promise("R24")
@pytest.mark.parametrize("name", TABLES)
async def test_each_field_and_limit_has_its_documented_status(name: str, start, stand_in) -> None:
    gateway, client = await start(stand_in)
    base, rows = TABLES[name]
    wrong = []
    async with grpc.aio.insecure_channel(client.address) as channel:
        for label, change, expected, names in rows:
            request = type(base)()
            request.CopyFrom(base)
            change(request)
            status, details = await send(channel, f"/winnow.v1.Winnow/{name}", request.SerializeToString())
            if status != expected or names not in details:
                wrong.append((label, expected, status, details))
    assert wrong == []
    assert len(gateway.calls) == 0
    gateway.admission.check()


def test_the_tables_cover_every_call_and_every_field_of_the_public_service() -> None:
    assert {f"/winnow.v1.Winnow/{name}" for name in TABLES} == set(methods_of(["winnow.v1.Winnow"]))
    free = {"strict", "no_cache"}  # every value of a bool is valid
    for name, (base, rows) in TABLES.items():
        labels = " ".join(label for label, *_ in rows)
        missing = [f.name for f in base.DESCRIPTOR.fields if f.name not in free | {"sampling"} and f.name not in labels]
        assert missing == [], name
    labels = " ".join(label for label, *_ in GENERATE)
    assert [f.name for f in common_pb2.Sampling.DESCRIPTOR.fields if f.name not in labels] == ["ignore_eos"]


@pytest.mark.promise("R24")
async def test_bad_utf8_garbage_and_an_oversized_message_have_their_codes(start, stand_in) -> None:
    _, client = await start(stand_in)
    async with grpc.aio.insecure_channel(client.address, options=[("grpc.max_send_message_length", -1)]) as channel:
        for rpc in methods_of(["winnow.v1.Winnow"]):
            assert (await send(channel, rpc, b"\xff\xff\xff"))[0] == BAD, rpc
        for rpc, field in (
            ("Generate", 2),
            ("Rank", 2),
            ("OpenSession", 2),
            ("CloseSession", 1),
            ("Cancel", 1),
            ("ListMethods", 1),
        ):
            bad_utf8 = bytes([field << 3 | 2, 2, 0xC3, 0x28])
            status, details = await send(channel, f"/winnow.v1.Winnow/{rpc}", bad_utf8)
            assert (status, "decoded" in details) == (BAD, True), rpc
        assert (await send(channel, "/winnow.v1.Winnow/Generate", b"x" * (9 << 20)))[0] == "RESOURCE_EXHAUSTED"
        assert (await send(channel, "/winnow.v1.Winnow/Nothing", b""))[0] == "UNIMPLEMENTED"
        assert (await send(channel, "/winnow.v1.Nothing/Nothing", b""))[0] == "UNIMPLEMENTED"


@pytest.mark.promise("R24")
async def test_a_gateway_without_workers_is_unavailable_and_names_the_role(start) -> None:
    _, client = await start()
    async with grpc.aio.insecure_channel(client.address) as channel:
        for name in ("Generate", "Rank", "OpenSession"):
            status, details = await send(channel, f"/winnow.v1.Winnow/{name}", TABLES[name][0].SerializeToString())
            assert (status, "no prefill worker" in details) == ("UNAVAILABLE", True)


@pytest.mark.promise("R25")
@pytest.mark.timeout(120)
async def test_mutated_messages_never_crash_leak_or_wedge_the_gateway(start, stand_in, capfd) -> None:
    """Seeded: a failure prints the seed and the bytes' number."""
    gateway, client = await start(stand_in)
    seed = 20260101
    rng = random.Random(seed)
    allowed = {OK, BAD, LONG, MISSING, UNFIT, "RESOURCE_EXHAUSTED", "ALREADY_EXISTS", "UNAVAILABLE"}
    telemetry.configure_logging(TelemetryConfig(log_level="debug"), "test")
    async with grpc.aio.insecure_channel(client.address) as channel:
        for round_ in range(30):
            for name, (base, rows) in TABLES.items():
                request = type(base)()
                request.CopyFrom(base)
                rng.choice(rows)[1](request)
                for field in ("prompt", "query", "text", "question"):
                    if hasattr(request, field) and getattr(request, field):
                        setattr(request, field, CANARY)
                raw = bytearray(request.SerializeToString()[:4096])
                for _ in range(rng.randrange(3)):
                    at = rng.randrange(len(raw) + 1)
                    raw[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
                status, details = await send(channel, f"/winnow.v1.Winnow/{name}", bytes(raw))
                assert status in allowed, (seed, round_, name, status, details)
                assert CANARY not in details and "Traceback" not in details and ".py" not in details
    assert (await client.complete("still well")).text == "hello world"
    written = capfd.readouterr()
    for secret in (CANARY, SECRET, mint(SECRET)[:20]):
        assert secret not in written.err + written.out
    gateway.admission.check()

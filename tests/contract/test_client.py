"""`winnow.Client` from a thread and `winnow.AsyncClient`, against a real gateway: results, errors, address and token."""

from __future__ import annotations

import asyncio
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

import winnow
from winnow import AsyncClient, Client, errors
from winnow.services.common.auth import mint
from winnow.types import Document, Sampling

SECRET = "a-signing-secret-for-tests-only-0123456789"


async def test_the_synchronous_client_does_everything_the_asynchronous_one_does(start, stand_in) -> None:
    _, other = await start(stand_in)

    def everything() -> None:
        with Client(other.address, mint(SECRET), deadline_s=15) as client:
            chunks = list(client.generate("x", sampling=Sampling(max_tokens=50), temperature=0.5, seed=3))
            assert [c.stage for c in chunks if c.stage] == ["prefill"]
            assert "".join(c.text for c in chunks) == "hello world"
            assert chunks[-1].finish_reason == "eos" and chunks[-1].usage is not None
            result = client.complete("x", stop="wor")
            assert (result.text, result.finish_reason) == ("hello ", "stop")
            ranking = client.rank("q", [Document("a", "x"), Document("b", "y")])
            assert [i.doc_id for i in ranking.items] == ["a", "b"]
            session = client.open_session("some text")
            assert "".join(c.text for c in client.ask(session.session_id, "?")) == "hello world"
            assert [s.session_id for s in client.sessions()] == [session.session_id]
            client.close_session(session.session_id)
            assert client.sessions() == []
            assert {m.slot for m in client.methods("decode")} == {"decode"}
            assert [m.name for m in client.models()] == ["tiny"]
            assert client.capabilities().max_context_tokens == 2048
            assert client.status().state == "serving"
            with pytest.raises(errors.UnknownName):
                client.cancel("nobody")
            with pytest.raises(errors.InvalidRequest, match=r"sampling\.temperature"):
                client.complete("x", temperature=-1)
            with pytest.raises(errors.ContextTooLong):
                client.complete("x", max_tokens=4096)

    await asyncio.to_thread(everything)


def test_both_clients_have_the_same_calls_and_arguments() -> None:
    for name, method in inspect.getmembers(Client, inspect.isfunction):
        if not name.startswith("_"):
            assert list(inspect.signature(method).parameters) == list(inspect.signature(getattr(AsyncClient, name)).parameters), (
                name
            )


async def test_leaving_an_iteration_cancels_the_request(start, stand_in) -> None:
    stand_in.hold = "decode"
    gateway, client = await start(stand_in)

    def leave() -> None:
        with Client(client.address, mint(SECRET)) as own:
            for chunk in own.generate("x"):
                if chunk.stage == "prefill":
                    break

    await asyncio.to_thread(leave)
    async with asyncio.timeout(5):
        while len(gateway.calls) or stand_in.leases:
            await asyncio.sleep(0.01)


async def test_nobody_listening_is_worker_lost_in_plain_words(start) -> None:
    gateway, client = await start()
    await gateway.stop()
    async with AsyncClient(client.address, "t") as own:
        with pytest.raises(errors.WorkerLost, match=f"no answer from {client.address}"):
            await own.status()


async def test_a_message_over_the_limit_says_which_setting_to_raise(start, stand_in) -> None:
    _, client = await start(stand_in, gateway={"max_message_bytes": 1 << 16})
    with pytest.raises(errors.Overloaded, match=r"gateway\.max_message_bytes"):
        await client.complete("x" * (1 << 17))


async def test_a_call_that_did_no_work_is_tried_again_until_a_worker_is_there(start, stand_in) -> None:
    stand_in.fail["hello"] = errors.WorkerLost("this worker is not ready yet")
    gateway, client = await start(stand_in)
    asking = asyncio.create_task(client.complete("x", deadline_s=15))
    async with asyncio.timeout(5):
        while not any(w.state == "starting" for w in gateway.router.workers):
            await asyncio.sleep(0.01)
    stand_in.fail.clear()
    assert (await asking).text == "hello world"


def test_address_and_token_come_from_arguments_then_environment_then_the_running_pipeline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from winnow.client_calls import Endpoint

    monkeypatch.setenv("WINNOW_HOME", str(tmp_path))
    for name in ("WINNOW_ADDRESS", "WINNOW_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(errors.ConfigError, match="winnow up"):
        Endpoint.find(None, None)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.json").write_text(json.dumps({"address": "127.0.0.1:1", "token": "state", "pid": 3}))
    assert Endpoint.find(None, None) == Endpoint("127.0.0.1:1", "state")
    assert Endpoint.find("10.0.0.1:2", None) == Endpoint("10.0.0.1:2", "")  # never this machine's token to another server
    monkeypatch.setenv("WINNOW_ADDRESS", "127.0.0.1:3")
    monkeypatch.setenv("WINNOW_TOKEN", "env")
    assert Endpoint.find(None, None) == Endpoint("127.0.0.1:3", "env")
    assert Endpoint.find("a:4", "arg") == Endpoint("a:4", "arg")
    (tmp_path / "run" / "state.json").write_text("{torn")
    monkeypatch.delenv("WINNOW_ADDRESS")
    with pytest.raises(errors.ConfigError):
        Endpoint.find(None, None)


@pytest.mark.parametrize(
    ("options", "field"),
    [({"max_tokens": 2**40}, "max_tokens"), ({"seed": 2**70}, "seed"), ({"temperature": "warm"}, "temperature")],
)
async def test_values_a_message_cannot_carry_are_invalid_before_anything_is_sent(
    options: dict[str, Any], field: str, start, stand_in
) -> None:
    _, client = await start(stand_in)
    with pytest.raises(errors.InvalidRequest, match=field):
        await client.complete("x", **options)
    assert stand_in.asked == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"recall": 0.0}, r"^recall: must be a number in \(0, 1\], got 0.0; 1 keeps"),
        ({"recall": 1.0001}, r"got 1\.0001"),
        ({"recall": -0.5}, r"got -0\.5"),
        ({"recall": float("nan")}, "got nan"),
        ({"recall": "high"}, "got 'high'"),
        ({"recall": True}, "got True"),
        ({"recall": 0.9, "prefill": "flexprefill"}, "prefill names 'flexprefill'; leave one of them out"),
        ({"recall": 0.9, "prefill": "recall:recall=0.8"}, "given twice"),
        ({"recall": 0.9, "session": "s", "question": "?"}, "the session's text was read when it was opened"),
    ],
)
async def test_a_recall_that_cannot_be_is_refused_before_anything_is_sent(
    options: dict[str, Any], text: str, start, stand_in
) -> None:
    _, client = await start(stand_in)
    prompt = () if "session" in options else ("x",)
    with pytest.raises(errors.InvalidRequest, match=text):
        await client.complete(*prompt, **options)

    def synchronous() -> None:
        with Client(client.address, mint(SECRET)) as own, pytest.raises(errors.InvalidRequest, match=text):
            own.complete(*prompt, **options)

    await asyncio.to_thread(synchronous)
    assert stand_in.asked == []


async def test_recall_travels_as_the_recall_methods_parameter_and_comes_back_in_the_usage(start, stand_in) -> None:
    _, client = await start(stand_in)
    stand_in.prefill = {"recall": 0.0, "dense_share": 0.25}
    usage = (await client.complete("x", recall=0.95)).usage
    assert (usage.prefill_recall, usage.prefill_dense_share) == (0.0, 0.25), "0 is a measured value"
    stand_in.prefill = {}
    usage = (await client.complete("x", prefill="recall:rows=32", recall=1)).usage
    assert (usage.prefill_recall, usage.prefill_dense_share) == (None, 0.0)
    asked = [(r.method.name, dict(r.method.params)) for r in stand_in.requests("prefill")]
    assert asked == [("recall", {"recall": "0.95"}), ("recall", {"recall": "1.0", "rows": "32"})]


def test_the_clients_are_imported_only_when_used() -> None:
    assert {"Client", "AsyncClient"} <= set(winnow.__all__)
    with pytest.raises(AttributeError):
        _ = winnow.Nothing

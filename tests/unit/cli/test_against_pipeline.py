"""The commands against a pipeline that the command itself started: a tiny random model, all roles in one process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from winnow.client import Client
from winnow.workers.model.tiny import make_tiny_model

SCRIPT = str(Path(sys.executable).with_name("winnow"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def in_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture
def run(winnow: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, stdin="": winnow(*arguments, stdin=stdin.encode(), columns=200)


@pytest.fixture
def as_json(run: Callable[..., Any]) -> Callable[..., Any]:
    def parsed(*arguments: str, stdin: str = "") -> Any:
        done = run(*arguments, "--json", stdin=stdin)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return parsed


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("home")
    model = make_tiny_model(home / "tiny")
    before = os.environ.get("WINNOW_HOME")
    os.environ["WINNOW_HOME"] = str(home)
    try:
        done = in_process("up", "--single", "--port", "0", "--model", str(model), "--dtype", "fp32", "--set", "model.name=tiny")
        assert done.returncode == 0, done.stderr
        assert "winnow serves on 127.0.0.1:" in done.stdout
        yield home
        assert in_process("down").stdout.strip() == "stopped"
    finally:
        if before is None:
            del os.environ["WINNOW_HOME"]
        else:
            os.environ["WINNOW_HOME"] = before


@pytest.fixture(autouse=True)
def same_home(pipeline: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_HOME", str(pipeline))


def test_a_second_one_is_refused(run: Callable[..., Any]) -> None:
    done = run("up", "--single")
    assert done.returncode == 2
    assert "already running" in done.stderr and "winnow down" in done.stderr


def test_status_names_the_workers(run: Callable[..., Any], as_json: Callable[..., Any]) -> None:
    status = as_json("status")
    assert status["state"] == "serving"
    assert [worker["state"] for worker in status["workers"]] == ["serving"]
    assert "serving" in run("status").stdout


def test_methods_and_models_are_listed(run: Callable[..., Any], as_json: Callable[..., Any]) -> None:
    methods = {(method["slot"], method["name"]) for method in as_json("methods")}
    assert {
        ("prefill", "dense"),
        ("prefill", "flexprefill"),
        ("decode", "retrieval-attention"),
        ("ranker", "likelihood"),
    } <= methods
    assert {method["slot"] for method in as_json("methods", "--slot", "decode")} == {"decode"}
    assert [model["name"] for model in as_json("models")] == ["tiny"]
    assert "flexprefill" in run("methods").stdout and "tiny" in run("models").stdout


def test_doctor_sees_the_running_pipeline(as_json: Callable[..., Any]) -> None:
    findings = {finding["topic"]: finding for finding in as_json("doctor")["findings"]}
    assert findings["server"]["level"] == "ok" and "1 of 1 workers serving" in findings["server"]["text"]


def test_generate_streams_and_reports(run: Callable[..., Any], as_json: Callable[..., Any], tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("The budget was cut. " * 20)
    done = run("generate", "--file", str(notes), "What was cut?", "--max-tokens", "8", "--ignore-eos")
    assert done.returncode == 0, done.stderr
    assert "8 tokens at" in done.stderr and "ended by length" in done.stderr
    answer = as_json("generate", "--file", str(notes), "What was cut?", "--max-tokens", "8", "--ignore-eos", "--no-stream")
    assert answer["usage"]["completion_tokens"] == 8 and answer["finish_reason"] == "length"
    assert answer["usage"]["cached_tokens"] > 0
    assert answer["text"] == done.stdout.removesuffix("\n")


def test_methods_are_chosen_by_name_with_parameters(as_json: Callable[..., Any]) -> None:
    text = "A long text. " * 60
    method = ("--prefill", "flexprefill:gamma=0.5", "--decode", "retrieval-attention:top_k=8,sink_tokens=4,recent_tokens=8")
    answer = as_json("generate", "Why?", "--file", "-", "--max-tokens", "6", "--ignore-eos", *method, stdin=text)
    assert answer["usage"]["keys_read_share"] < 1
    assert answer["usage"]["fallback_used"] == ""


def test_a_recall_is_asked_for_and_the_line_says_what_was_reached(
    run: Callable[..., Any], as_json: Callable[..., Any], tmp_path: Path
) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("The budget was cut. " * 40)
    asked = ("generate", "--file", str(notes), "What was cut?", "--max-tokens", "2", "--ignore-eos", "--no-cache")
    done = run(*asked, "--recall", "0.9")
    assert done.returncode == 0, done.stderr
    reached = re.search(r"prefill density \d\.\d\d at recall (\d\.\d{3})", done.stderr)
    assert reached and float(reached[1]) >= 0.85
    assert "recall" not in run(*asked).stderr
    assert as_json(*asked)["usage"]["prefill_recall"] is None
    kept = run("generate", "--file", str(notes), "--keep", "What?", "--recall", "0.9", "--max-tokens", "2", "--ignore-eos")
    assert kept.returncode == 0 and re.search(
        r"session \S+ \(\d+ tokens, recall (1\.000|0\.9\d\d) of what was computed\)", kept.stderr
    ), kept.stderr


def test_what_came_from_the_cache_is_not_said_to_be_dense(
    run: Callable[..., Any], as_json: Callable[..., Any], tmp_path: Path
) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("The tax was raised. " * 40)
    asked = ("generate", "--file", str(notes), "What was raised?", "--recall", "0.9", "--max-tokens", "2", "--ignore-eos")
    first = as_json(*asked)["usage"]
    assert first["cached_tokens"] == 0 and first["prefill_recall"] is not None
    again = run(*asked).stderr
    assert f"prefill: all {first['prompt_tokens'] - 1} tokens from the cache" in again and "density" not in again


def test_the_question_may_come_from_standard_input(as_json: Callable[..., Any]) -> None:
    assert as_json("generate", "-", "--max-tokens", "2", "--ignore-eos", stdin="Why?")["usage"]["completion_tokens"] == 2


def test_logprobs_are_in_the_json(as_json: Callable[..., Any]) -> None:
    answer = as_json("generate", "--raw", "abc", "--max-tokens", "2", "--ignore-eos", "--logprobs", "3")
    assert [len(token) >= 3 for token in answer["logprobs"]] == [True, True]
    assert all(item["logprob"] <= 0 for token in answer["logprobs"] for item in token)


def test_a_session_is_kept_and_asked_again(run: Callable[..., Any], as_json: Callable[..., Any], tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("Something happened. " * 30)
    first = as_json("generate", "--file", str(notes), "--keep", "What?", "--max-tokens", "3", "--ignore-eos")
    again = as_json("generate", "--session", first["session_id"], "When?", "--max-tokens", "3", "--ignore-eos")
    assert again["usage"]["cached_tokens"] > 300
    assert "no such open session" in run("generate", "--session", "nobody", "When?").stderr


def test_rank_shows_the_best_and_lists_skipped_lines(run: Callable[..., Any], as_json: Callable[..., Any]) -> None:
    lines = '{"id": "a", "text": "one"}\nbroken\n{"id": "b", "text": "two"}\n{"id": "c", "text": "three"}\n'
    ranking = as_json("rank", "-", "--query", "two", "--top", "2", "--on-error", "skip", stdin=lines)
    assert [item["rank"] for item in ranking["items"]] == [1, 2]
    assert ranking["documents"] == 3 and [bad["number"] for bad in ranking["skipped"]] == [2]
    done = run("rank", "-", "--query", "two", "--on-error", "skip", stdin=lines)
    assert done.returncode == 0
    assert "1 lines skipped:" in done.stderr and "line 2: not JSON" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("generate", "q", "--prefill", "flexprefil"), 2, ("flexprefil", "flexprefill")),
        (("generate", "q", "--decode", "retrieval-attention:top_q=1"), 2, ("top_q", "top_k")),
        (("generate", "x" * 20000), 2, ("2048",)),
        (("generate", " "), 2, ("question",)),
        (("status", "--token", "nonsense"), 77, ("token",)),
    ],
    ids=["unknown-method", "unknown-parameter", "too-long", "empty", "bad-token"],
)
def test_a_refusal_is_one_line(run: Callable[..., Any], arguments: tuple[str, ...], code: int, words: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert [word for word in words if word not in line] == []


def test_a_token_without_the_scope_is_not_allowed(run: Callable[..., Any]) -> None:
    token = run("token", "create", "--scope", "read").stdout.strip()
    assert run("status", "--token", token).returncode == 0
    done = run("generate", "q", "--token", token)
    assert done.returncode == 77 and "scope" in done.stderr


@pytest.mark.promise("R6")
def test_ctrl_c_stops_the_work_on_the_server() -> None:
    process = subprocess.Popen(
        [SCRIPT, "generate", "--raw", "abc", "--max-tokens", "1900", "--ignore-eos"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it, and so do its own
    )
    assert process.stdout is not None and process.stdout.read(1)  # the first character: it is generating
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130, error
    assert b"Traceback" not in error
    with Client() as client:
        ends = time.monotonic() + 5
        while client.status().inflight and time.monotonic() < ends:
            pass  # each look is a call to the server
        assert client.status().inflight == 0

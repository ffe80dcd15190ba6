"""The command as a user meets it: help, one red line for an error, exit codes, JSON. No pipeline needed."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from winnow import errors
from winnow.cli.checks import EXTRAS
from winnow.cli.exits import exit_code
from winnow.errors import StatusName, WinnowError

Winnow = Callable[..., subprocess.CompletedProcess[str]]
COMMANDS = [
    ["up"], ["down"], ["demo"], ["generate"], ["rank"], ["rank-batch"], ["status"], ["methods"], ["models"], ["doctor"],
    ["config", "show"], ["token", "create"],
]  # fmt: skip


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """One line on standard error with these words, this exit code, no trace."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert [word for word in words if word not in line] == []


def test_help_lists_every_command_and_the_exit_codes(winnow: Winnow) -> None:
    done = winnow("--help")
    assert done.returncode == 0
    assert [command[0] for command in COMMANDS if command[0] not in done.stdout] == []
    assert "69 nothing answers" in done.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(winnow: Winnow, command: list[str]) -> None:
    done = winnow(*command, "--help", columns=80)
    assert done.returncode == 0
    assert "Usage:" in done.stdout and len(done.stdout.splitlines()) > 5
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_the_installed_script_runs() -> None:
    script = Path(sys.executable).with_name("winnow")
    done = subprocess.run([str(script), "--version"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and done.stdout.startswith("winnow ")


def test_version(winnow: Winnow) -> None:
    done = winnow("--version")
    assert done.returncode == 0 and done.stdout.startswith("winnow ")


@pytest.mark.parametrize("command", [["status"], ["methods"], ["models"], ["generate", "hello"]], ids=" ".join)
def test_without_a_pipeline_a_command_says_how_to_start_one(winnow: Winnow, command: list[str]) -> None:
    refused(winnow(*command), 69, "winnow up")


def test_an_address_nobody_listens_on_is_unavailable(winnow: Winnow) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    refused(winnow("status", "--address", f"127.0.0.1:{port}", "--token", "x"), 69)


def test_errors_are_json_too_with_json(winnow: Winnow) -> None:
    done = winnow("models", "--json")
    assert done.returncode == 69
    assert json.loads(done.stdout)["error"]["code"] == "UNAVAILABLE"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "q", "--temperature", "nan"], ["sampling.temperature", "[0.0, 10.0]"]),
        (["generate", "q", "--top-p", "0"], ["sampling.top_p"]),
        (["generate", "q", "--max-tokens", "0"], ["sampling.max_tokens"]),
        (["generate", "q", "--recall", "1.5"], ["--recall", "(0, 1]", "1.5", "0.99"]),
        (["generate", "q", "--recall", "0.9", "--prefill", "xattention"], ["--recall", "xattention", "leave one of them out"]),
        (["generate", "q", "--recall", "0.9", "--session", "s"], ["--recall", "when it was opened"]),
        (["generate", "q", "--file", "missing.txt"], ["--file", "No such file"]),
        (["generate", "q", "--keep"], ["--keep", "--file"]),
        (["generate", "-", "--file", "-"], ["standard input"]),
        (["generate", "q", "--session", "s", "--raw"], ["--session"]),
        (["generate", "q", "--raw", "--system", "s"], ["--raw"]),
        (["rank", "missing.jsonl", "--query", "q"], ["documents", "No such file"]),
        (["up", "--config", "missing.toml"], ["--config"]),
        (["up", "--set", "gateway.prot=1"], ["gateway.prot", "did you mean port"]),
        (["up", "--port", "70000"], ["gateway.port", "65535"]),
        (["up", "--dtype", "fp8"], ["model.dtype"]),
        (["config", "show", "--set", "nonsense"], ["--set"]),
        (["token", "create", "--scope", "root"], ["--scope", "generate"]),
        (["token", "create", "--ttl", "never"], ["--ttl"]),
        (["methods", "--slot", "spleen"], ["--slot", "prefill"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_a_wrong_value_is_one_line_that_names_it(
    winnow: Winnow, arguments: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(winnow(*arguments), 2, *words)


def test_a_default_method_that_cannot_be_made_is_refused_before_a_model_is_fetched(
    winnow: Winnow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("winnow.workers.model.default_model.ensure_default_model", lambda *_: pytest.fail("it was fetched"))
    refused(winnow("up", "--set", "prefill.method=foo"), 2, "prefill.method: unknown prefill method 'foo'", "flexprefill")


def test_a_bad_line_of_documents_is_named(winnow: Winnow) -> None:
    refused(winnow("rank", "-", "--query", "q", stdin=b'{"id": "a", "text": "x"}\n{"id"\n'), 2, "line 2", "--on-error skip")


def test_a_file_that_is_not_text_is_refused(winnow: Winnow, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"abc\xff")
    refused(winnow("generate", "q", "--file", str(path)), 2, "--file", "byte 3")


def test_unknown_options_are_usage_errors(winnow: Winnow) -> None:
    done = winnow("up", "--sinlge")
    assert done.returncode == 2
    assert "--single" in done.stderr and "Traceback" not in done.stderr


def test_down_with_nothing_running_is_no_error(winnow: Winnow) -> None:
    done = winnow("down")
    assert (done.returncode, done.stdout.strip()) == (0, "nothing was running")


def test_config_show_prints_every_setting_as_json(winnow: Winnow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_GATEWAY__PORT", "7999")
    done = winnow("config", "show", "--json")
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["gateway.port"] == {
        "name": "gateway.port",
        "value": 7999,
        "origin": "env WINNOW_GATEWAY__PORT",
        "env": "WINNOW_GATEWAY__PORT",
    }
    assert rows["model.dtype"]["origin"] == "default"


def test_a_created_token_is_signed_for_the_gateway(winnow: Winnow, monkeypatch: pytest.MonkeyPatch) -> None:
    from winnow.services.common.auth import PUBLIC, verify

    monkeypatch.setenv("WINNOW_AUTH__SECRET", "k" * 40)
    done = winnow("token", "create", "--scope", "rank", "--tenant", "t", "--ttl", "1h")
    principal = verify(done.stdout.strip(), "k" * 40, PUBLIC)
    assert (principal.tenant, principal.scopes) == ("t", {"rank"})


def test_a_secret_that_is_too_short_is_refused_and_not_shown(winnow: Winnow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_AUTH__SECRET", "hush")
    done = winnow("token", "create")
    refused(done, 2, "auth.secret", "32")
    assert "hush" not in done.stderr


def test_doctor_reports_versions_and_a_missing_redis(winnow: Winnow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_METADATA__REDIS_URL", "redis://me:hush@127.0.0.1:1/0")
    done = winnow("doctor", "--json")
    findings = {finding["topic"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert done.returncode == 1
    assert findings["torch"]["level"] == "ok"
    assert findings["redis"]["level"] == "problem" and "does not answer" in findings["redis"]["text"]
    assert findings["server"]["level"] == "note"
    assert "hush" not in done.stdout


def test_doctor_names_the_setting_of_a_default_method_that_cannot_be_made(
    winnow: Winnow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WINNOW_PREFILL__METHOD", "foo")
    monkeypatch.setenv("WINNOW_RANK__METHOD", "icr:wings=2")
    done = winnow("doctor", "--json")
    findings = {finding["topic"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert done.returncode == 1
    assert findings["prefill.method"]["level"] == findings["rank.method"]["level"] == "problem"
    assert "unknown prefill method 'foo'" in findings["prefill.method"]["text"] and "wings" in findings["rank.method"]["text"]
    assert "WINNOW_PREFILL__METHOD" in findings["prefill.method"]["remedy"] and "decode.method" not in findings


def test_doctor_knows_every_extra_that_users_install() -> None:
    project = tomllib.loads((Path(__file__).resolve().parents[3] / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS) == set(project["optional-dependencies"]) - {"dev"}


def test_doctor_sees_a_port_in_use(winnow: Winnow, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("WINNOW_GATEWAY__PORT", str(taken.getsockname()[1]))
        done = winnow("doctor", "--json")
    findings = {finding["topic"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert findings["port"]["level"] == "problem" and "--port 0" in findings["port"]["remedy"]


def test_every_error_has_a_documented_exit_code() -> None:
    import winnow.cli.exits as exits

    table = exits.__doc__ or ""
    for status in StatusName:
        error = WinnowError("x")
        error.code = status
        code = exit_code(error)
        assert f"| {code} |" in table
        if code != exits.FAILED:
            (row,) = [line for line in table.splitlines() if line.startswith(f"| {code} |")]
            assert status.value in row


def test_unexpected_errors_are_one_line_unless_debug_is_given() -> None:
    program = (
        "import sys; from winnow.cli import app, main\nimport winnow.cli.app as a\n"
        "def broken():\n    raise ZeroDivisionError('canary')\na.app.command('broken')(broken)\nsys.argv[1:] = {}\nmain()\n"
    )
    plain = subprocess.run(
        [sys.executable, "-c", program.replace("{}", "['broken']")], capture_output=True, text=True, check=False
    )
    assert plain.returncode == 1 and "Traceback" not in plain.stderr and "ZeroDivisionError" in plain.stderr
    debug = subprocess.run(
        [sys.executable, "-c", program.replace("{}", "['--debug', 'broken']")], capture_output=True, text=True, check=False
    )
    assert debug.returncode == 1 and "Traceback" in debug.stderr and "canary" in debug.stderr


def test_every_error_class_can_be_said() -> None:
    classes = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, WinnowError)]
    assert {exit_code(cls("x")) for cls in classes} <= {1, 2, 69, 75, 77, 130}

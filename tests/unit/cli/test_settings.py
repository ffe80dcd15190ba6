"""Settings from flags, and where a value comes from; secrets never show."""

from __future__ import annotations

from pathlib import Path

import pytest

from winnow.cli.settings import MASK, env_name, explain, fields, flags_from, masked
from winnow.cli.tokens import seconds
from winnow.errors import ConfigError, InvalidRequest


def origins(file: Path | None = None, flags: dict[str, dict[str, str]] | None = None) -> dict[str, tuple[object, str]]:
    return {row.name: (row.value, row.origin) for row in explain(file, flags or {})}


def test_options_that_were_not_given_are_left_out_and_set_wins() -> None:
    flags = flags_from({"gateway.port": 7, "model.source": None}, ["gateway.port=9", "kv.budget_bytes=1"])
    assert flags == {"gateway": {"port": "9"}, "kv": {"budget_bytes": "1"}}


@pytest.mark.parametrize("text", ["port=1", "gateway.port", "a.b.c=1", "=1"])
def test_a_set_text_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--set: expected part\.field=value"):
        flags_from({}, [text])


def test_each_value_names_who_set_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "w.toml"
    file.write_text('[gateway]\nport = 1234\nmax_queue = 3\n[model]\nsource = "a"\n')
    monkeypatch.setenv("WINNOW_GATEWAY__MAX_QUEUE", "5")
    monkeypatch.setenv("WINNOW_KV", '{"lease_s": 9}')
    found = origins(file, {"model": {"source": "b"}})
    assert found["model.source"] == ("b", "flag")
    assert found["gateway.max_queue"] == (5, "env WINNOW_GATEWAY__MAX_QUEUE")
    assert found["kv.lease_s"] == (9.0, "env WINNOW_KV")
    assert found["gateway.port"] == (1234, "file w.toml")
    assert found["gateway.max_inflight"] == (16, "default")


def test_the_file_in_the_home_is_found(own_home: Path) -> None:
    (own_home / "winnow.toml").write_text("[decode]\nmax_batch = 3\n")
    assert origins()["decode.max_batch"] == (3, "file winnow.toml")


def test_secrets_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_AUTH__SECRET", "s" * 40)
    monkeypatch.setenv("WINNOW_METADATA__REDIS_URL", "redis://me:hush@host:6379/0")
    found = origins()
    assert found["auth.secret"] == (MASK, "env WINNOW_AUTH__SECRET")
    assert "hush" not in str(found) and "ssss" not in str(found)
    assert masked("metadata.redis_url", "redis://host:1/0") == "redis://host:1/0"


def test_every_setting_has_a_variable_of_its_own() -> None:
    names = [env_name(name) for name, _, _ in fields()]
    assert len(names) == len(set(names)) > 40
    assert "WINNOW_GATEWAY__PORT" in names


@pytest.mark.parametrize(("text", "expected"), [("90s", 90), ("15m", 900), ("12h", 43200), ("30d", 2592000), ("7", 7)])
def test_spans(text: str, expected: int) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-1", "1w", "1.5h", "nan", "9" * 12])
def test_spans_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="--ttl"):
        seconds(text)

"""Who sits where."""

from __future__ import annotations

import pytest

from winnow.config import ClusterConfig, ModelConfig, WinnowConfig
from winnow.errors import ContextTooLong, Overloaded, WinnowError
from winnow.orchestration import control
from winnow.orchestration.seats import seats_of, single_seat, thread_environment


def test_each_role_gets_as_many_seats_as_configured_and_gpus_only_where_a_model_runs() -> None:
    seats = seats_of(ClusterConfig(prefill=2, decode=1, retrieval=1, draft=0, gpus_per_worker=0.5))
    assert {s.worker_id: s.n_gpus for s in seats} == {"prefill-0": 0.5, "prefill-1": 0.5, "decode-0": 0.5, "retrieval-0": 0.0}
    assert all(len(s.roles) == 1 for s in seats)


def test_one_process_hosts_every_role_that_is_wanted() -> None:
    assert single_seat(ClusterConfig(prefill=3, draft=0)).roles == ("prefill", "retrieval", "decode")


def test_threads_come_from_the_configuration_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert thread_environment(WinnowConfig(model=ModelConfig(threads=5)))["OMP_NUM_THREADS"] == "5"
    assert thread_environment(WinnowConfig())["OMP_NUM_THREADS"] == "3"
    assert thread_environment(WinnowConfig())["OMP_WAIT_POLICY"] == "passive"


def test_the_configuration_survives_the_pipe_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    config = WinnowConfig(model=ModelConfig(source="a", threads=2))
    monkeypatch.setenv("WINNOW_MODEL__SOURCE", "b")
    monkeypatch.setenv("WINNOW_GATEWAY__PORT", "1")
    assert control.config_from_wire(control.config_to_wire(config)) == config


@pytest.mark.parametrize("error", [ContextTooLong("prompt: 9 tokens, at most 8"), Overloaded("queue: full")])
def test_a_deliberate_error_keeps_class_and_text_through_the_pipe_even_from_a_group(error: WinnowError) -> None:
    sent = control.error_to_wire(ExceptionGroup("tasks", [RuntimeError("secret path"), error]))
    back = control.error_from_wire(sent)
    assert type(back) is type(error) and str(back) == str(error)


def test_an_unexpected_error_travels_without_its_text() -> None:
    back = control.error_from_wire(control.error_to_wire(RuntimeError("/home/someone/secret")))
    assert type(back) is WinnowError
    assert "secret" not in str(back) and "RuntimeError" in str(back)


@pytest.mark.parametrize("line", [b"", b"junk\n", b"[1]\n", b'"x"\n', b"\xff\n"])
def test_a_line_that_is_no_message_reads_as_none(line: bytes) -> None:
    assert control.parse(line) == {}

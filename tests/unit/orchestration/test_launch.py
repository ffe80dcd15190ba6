"""Starting and stopping for real, in one process and without Ray: what is said when it cannot work, and what is left."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from winnow import Client
from winnow.config import WinnowConfig
from winnow.errors import Cancelled, ConfigError, Conflict, UnknownName, WinnowError
from winnow.orchestration import processes, state
from winnow.orchestration.supervisor import down, read_state, up
from winnow.workers.model.tiny import make_tiny_model

from .conftest import RealRedis

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    home = Path(tempfile.mkdtemp(prefix="wn-"))
    monkeypatch.setenv("WINNOW_HOME", str(home))
    yield home
    monkeypatch.setenv("WINNOW_HOME", str(home))  # a test may have failed while it looked from another one
    down(30)
    shutil.rmtree(home)


def config_of(model: Path | str, **parts: dict[str, Any]) -> WinnowConfig:
    settings: dict[str, Any] = {
        "model": {"source": str(model), "dtype": "fp32", "threads": 1},
        "gateway": {"port": 0},
        "kv": {"budget_bytes": 64 << 20},
        "telemetry": {"metrics": False},
    }
    return WinnowConfig(**{**settings, **parts})


def nothing_is_left() -> None:
    assert read_state() is None
    pid, started = state.lock_holder()
    assert not processes.is_running(pid, started)
    assert processes.in_session(pid, started) == []
    assert not state.kv_dir("", 64 << 20).exists()


def test_no_redis_at_the_url_is_said_before_anything_is_loaded(model: Path, short_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"metadata\.redis_url.*no such file.*embedded server"):
        up(config_of(model, metadata={"redis_url": f"unix://{short_folder}/none.sock"}), single=True)
    nothing_is_left()


def test_a_port_in_use_is_said_before_anything_is_loaded(model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        steps: list[str] = []
        with pytest.raises(ConfigError, match=rf"gateway\.port: {port} .*in use"):
            up(config_of(model, gateway={"port": port}), single=True, on_progress=steps.append)
    assert steps == []
    nothing_is_left()


@pytest.mark.parametrize(
    ("part", "method", "said"),
    [
        ("prefill", "foo", r"prefill\.method: unknown prefill method 'foo' \(known: .*flexprefill"),
        ("prefill", "flexprefill:gama=0.9", r"prefill\.method: .*no parameter 'gama'"),
        ("decode", "retrieval-attention:top_k=many", r"decode\.method: .*top_k must be a whole number, got 'many'"),
        ("rank", "likelyhood", r"rank\.method: unknown ranker 'likelyhood'; did you mean 'likelihood'"),
    ],
)
def test_a_default_method_that_cannot_be_made_is_said_before_anything_is_started(
    model: Path, part: str, method: str, said: str
) -> None:
    steps: list[str] = []
    with pytest.raises(ConfigError, match=said):
        up(config_of(model, **{part: {"method": method}}), single=True, on_progress=steps.append)
    assert steps == []
    nothing_is_left()


def test_an_unknown_model_keeps_its_error_class_and_words(own_home: Path) -> None:
    with pytest.raises(UnknownName, match="model source"):
        up(config_of("no-such-model-here"), single=True)
    nothing_is_left()


def test_a_ray_cluster_elsewhere_needs_a_redis_it_can_reach(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"metadata\.redis_url.*cluster\.address"):
        up(config_of(model, cluster={"address": "192.0.2.1:6379"}))
    nothing_is_left()


def test_down_without_anything_running_says_so() -> None:
    assert down(1) is False


def test_stopping_while_it_starts_ends_both(model: Path) -> None:
    begun = threading.Event()
    errors: list[WinnowError] = []

    def start() -> None:
        try:
            up(config_of(model), single=True, on_progress=lambda text: begun.set())
        except WinnowError as error:
            errors.append(error)

    starting = threading.Thread(target=start)
    starting.start()
    assert begun.wait(60)
    assert down(60) is True
    starting.join(timeout=60)
    assert [type(e) for e in errors] == [Cancelled]
    nothing_is_left()


def test_one_process_serves_on_a_real_redis_that_a_second_deployment_may_not_share(
    model: Path, short_folder: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = RealRedis(short_folder)
    config = config_of(model, metadata={"redis_url": server.start()})
    try:
        started = up(config, single=True, detach=False)
        assert read_state() == started
        assert started.mode == "single" and started.pid != os.getpid()
        with Client() as client:  # finds address and token in the run folder
            assert client.complete("Once upon a time", max_tokens=4).usage.completion_tokens == 4
            assert client.status().metadata == "redis"
        with pytest.raises(Conflict, match="already running"):
            up(config, single=True)
        other = short_folder / "home"
        monkeypatch.setenv("WINNOW_HOME", str(other))
        with pytest.raises(Conflict, match="another winnow deployment uses this Redis"):
            up(config, single=True)
        monkeypatch.setenv("WINNOW_HOME", str(own_home))
        assert down(60) is True
        nothing_is_left()
    finally:
        server.stop()

"""`winnow up`, `winnow down`, `winnow demo`: start and stop a pipeline on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from winnow.cli.exits import FAILED, reported
from winnow.cli.options import AsJson, ConfigFile, Settings
from winnow.cli.screen import print_json, stage_bars, stderr, stdout
from winnow.cli.settings import flags_from
from winnow.config import WinnowConfig, load_config
from winnow.errors import Conflict


@contextmanager
def lines(*, shown: bool = True) -> Iterator[Callable[[str], None]]:
    """A function that shows the step under way: in place on a terminal, one line each elsewhere."""
    if not shown:
        yield lambda text: None
    elif stderr.is_terminal:
        with stderr.status("starting") as status:
            yield lambda text: status.update(text)
    else:
        yield lambda text: stderr.print(text, markup=False)


def fetch_default_model(config: WinnowConfig, *, shown: bool = True) -> None:
    """Download and convert the default model with progress bars, where the configuration asks for it.

    Raises:
        ConfigError: a default method that cannot be made; said before a model is fetched for nothing.
    """
    if config.model.source != "default":
        return
    from winnow.workers.defaults import check_defaults
    from winnow.workers.model.default_model import ensure_default_model

    check_defaults(config)
    with stage_bars(shown=shown) as on_stage:
        ensure_default_model(on_stage)


def up(
    single: Annotated[bool, typer.Option("--single", help="All roles in one process, without Ray.")] = False,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay until Ctrl-C or SIGTERM, then drain and stop.")] = False,
    config: ConfigFile = None,
    model: Annotated[str | None, typer.Option(help="Folder, .gguf file, hub id, or default.", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, fp32, fp16 or bf16.", show_default=False)] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.", show_default=False)] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of a worker; 0 = all cores.", show_default=False)] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to bind; others than loopback need TLS and tokens.", show_default=False)
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port of the gateway; 0 = any free one.", show_default=False)] = None,
    redis_url: Annotated[str | None, typer.Option(help="redis://, rediss:// or unix://; without it an embedded server.")] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Start the pipeline: metadata, workers, gateway. Returns when it serves; it goes on in the background.

    The first start downloads the default model (98 MB). Logs, state and a token for this user lie in WINNOW_HOME/run.
    """
    with reported(as_json=as_json):
        options = {
            "model.source": model,
            "model.dtype": dtype,
            "model.device": device,
            "model.threads": threads,
            "gateway.host": host,
            "gateway.port": port,
            "metadata.redis_url": redis_url,
        }
        loaded = load_config(config, flags_from(options, settings))
        from winnow.orchestration import launch
        from winnow.orchestration import state as run_state

        if run_state.read_state() is not None:  # said before a model is fetched for nothing
            raise Conflict(run_state.already_running())
        fetch_default_model(loaded, shown=not as_json)
        if foreground:
            code = launch.serve(loaded, single=single, on_progress=lambda text: stderr.print(text, markup=False))
            raise SystemExit(code)
        with lines(shown=not as_json) as on_progress:
            state = launch.up(loaded, single=single, on_progress=on_progress)
        if as_json:
            print_json({"address": state.address, "pid": state.pid, "mode": state.mode, "metrics_address": state.metrics_address})
            return
        stdout.print(f"[green]winnow serves on[/] [bold]{state.address}[/]  ({state.mode}, process {state.pid})")
        stdout.print('try   winnow generate "Write one sentence about rivers."\nstop  winnow down', markup=False)


def down(
    timeout: Annotated[float, typer.Option(help="Seconds for draining; after that it is killed.", min=0.0)] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Drain and stop the pipeline of this WINNOW_HOME: running requests finish first. Nothing running is no error."""
    with reported(as_json=as_json):
        from winnow.orchestration import launch

        with lines(shown=not as_json) as on_progress:
            stopped = launch.down(timeout, on_progress)
        if as_json:
            print_json({"stopped": stopped})
        else:
            stdout.print("stopped" if stopped else "nothing was running")


def demo(
    docs: Annotated[int, typer.Option(help="Documents to rank.", min=5, max=400)] = 100,
    queries: Annotated[int, typer.Option(help="Known-item queries to measure with; 0 leaves the measurement out.", min=0)] = 50,
    tokens: Annotated[int, typer.Option(help="Length of the long text.", min=200)] = 6400,
    single: Annotated[bool, typer.Option("--single", help="All roles in one process, without Ray.")] = False,
    model: Annotated[str, typer.Option(help="Another model: folder, .gguf file or hub id.")] = "default",
    as_json: AsJson = False,
) -> None:
    """Show the whole pipeline at work: rank real documents beside BM25, ask about a long text dense and sparse, stop everything.

    It uses a run folder and a port of its own: a pipeline that runs already is left alone. About five minutes on two cores.
    """
    with reported(as_json=as_json):
        from winnow.orchestration.demo.run import DemoOptions, run_demo

        options = DemoOptions(n_documents=docs, n_queries=queries, n_tokens=tokens, single=single, model=model)
        report = run_demo(options, stderr if as_json else stdout)
        if as_json:
            print_json(report)
        if not report.complete:
            raise SystemExit(FAILED)

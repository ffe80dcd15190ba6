"""The process behind `winnow up`: runs a deployment until SIGTERM, then drains (R18) and leaves nothing behind.

Run by hand: `python -m winnow.orchestration.supervisor [--single]`. For Python callers: `up`, `down`, `serve`, `read_state`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys

from winnow import telemetry
from winnow.config import WinnowConfig, load_config
from winnow.errors import Cancelled, ConfigError, WinnowError
from winnow.orchestration import control
from winnow.orchestration.deployment import Deployment
from winnow.orchestration.launch import down, serve, up
from winnow.orchestration.seats import thread_environment
from winnow.orchestration.state import RunState, read_state

__all__ = ["RunState", "down", "main", "read_state", "serve", "up"]


async def supervise(config: WinnowConfig, *, single: bool, out: control.LineWriter, lifeline: int = -1) -> int:
    """Start, report, wait for SIGTERM, SIGINT or the end of `lifeline` (a pipe), drain, stop. Returns the exit code.

    A second signal ends the drain at once.
    """
    loop = asyncio.get_running_loop()
    is_up, told_to_stop, hurry = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if told_to_stop.is_set() else told_to_stop).set()

    def on_hang_up() -> None:
        loop.remove_reader(lifeline)
        told_to_stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    if lifeline >= 0:
        loop.add_reader(lifeline, on_hang_up)
    deployment = Deployment(config, single=single, on_progress=lambda text: out.send(progress=text))
    log = telemetry.get_logger("supervisor")
    stopping = loop.create_task(told_to_stop.wait())
    code = 0

    async def work() -> None:
        started = await deployment.start()
        is_up.set()
        out.send(ready=vars(started))
        log.info("serving", address=started.address, mode=started.mode)
        await deployment.run()

    working = loop.create_task(work())
    await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
    if working.done() and (error := working.exception()) is not None:
        log.error("failed", reason=str(error) if isinstance(error, WinnowError) else telemetry.places(error), said=_texts(error))
        out.send(error=control.error_to_wire(error))
        code = 1
    elif not is_up.is_set():
        out.send(error=control.error_to_wire(Cancelled("winnow was told to stop while it was starting")))
    working.cancel()
    await asyncio.wait([working])
    log.info("draining", grace_s=config.gateway.drain_grace_s)
    draining = loop.create_task(deployment.stop(config.gateway.drain_grace_s if code == 0 else 0.0))
    hurrying = loop.create_task(hurry.wait())
    await asyncio.wait([draining, hurrying], return_when=asyncio.FIRST_COMPLETED)
    if not draining.done():
        draining.cancel()
        await asyncio.wait([draining])
        await deployment.stop(0.0)
    stopping.cancel()
    hurrying.cancel()
    log.info("stopped")
    return code


def main(arguments: list[str] | None = None) -> int:
    """Entry point. With --detach-ready-fd the configuration is one line of JSON on stdin and progress goes to that descriptor."""
    parser = argparse.ArgumentParser(
        prog="python -m winnow.orchestration.supervisor", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--single", action="store_true", help="all roles in this process, without Ray")
    parser.add_argument("--detach-ready-fd", type=int, default=-1, help="write progress, then ready or error, as JSON lines here")
    parser.add_argument("--attached", action="store_true", help="drain and stop when stdin closes")
    options = parser.parse_args(arguments)
    if options.detach_ready_fd >= 0:
        told = control.parse(control.read_line(0))
        config = control.config_from_wire(told["config"])
        os.set_inheritable(options.detach_ready_fd, False)
        out = control.LineWriter(options.detach_ready_fd)
    else:
        try:
            config = load_config()
        except ConfigError as error:
            print(error, file=sys.stderr)
            return 2
        out = control.LineWriter(os.dup(2))
    telemetry.configure_logging(config.telemetry, "supervisor")
    os.environ.update(thread_environment(config))
    os.umask(0o077)
    code = asyncio.run(supervise(config, single=options.single, out=out, lifeline=0 if options.attached else -1))
    out.close()
    return code


def _texts(error: BaseException) -> list[str]:
    """Texts of the deliberate errors inside an exception group, for the log."""
    if isinstance(error, BaseExceptionGroup):
        return [text for inner in error.exceptions for text in _texts(inner)]
    return [str(error)] if isinstance(error, WinnowError) else [telemetry.places(error)]


if __name__ == "__main__":
    sys.exit(main())

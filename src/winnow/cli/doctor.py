"""`winnow doctor`: versions, devices, room, ports, reachable services, extras missing and why."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

from winnow.cli import checks
from winnow.cli.checks import Finding
from winnow.cli.exits import FAILED, reported
from winnow.cli.options import AsJson, ConfigFile
from winnow.cli.screen import print_json, stderr, stdout, table
from winnow.config import WinnowConfig, load_config
from winnow.errors import WinnowError

_MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "problem": "[bold red]problem[/]"}


def server() -> Iterator[Finding]:
    """The pipeline this user would talk to, if there is one."""
    from winnow.cli.connect import connect

    try:
        with connect(None, None) as client:
            status = client.status()
    except WinnowError as error:
        yield Finding("note", "server", str(error), "`winnow up` starts one")
        return
    serving = sum(worker.state == "serving" for worker in status.workers)
    workers = f"{serving} of {len(status.workers)} workers serving"
    text = f"{status.state}, version {status.version}, {workers}, metadata {status.metadata}"
    yield Finding("ok" if serving == len(status.workers) else "note", "server", text)


def redis(config: WinnowConfig) -> Iterator[Finding]:
    """The Redis of the configuration; without one, that the embedded server is there."""
    from winnow.orchestration.metadata import RedisMetadata, masked

    url = config.metadata.redis_url
    if not url:
        yield Finding("ok", "metadata", "embedded server (metadata.redis_url is empty)")
        return

    async def answers() -> bool:
        store = RedisMetadata(url, timeout_s=max(config.metadata.timeout_s, 2.0))
        try:
            return await store.ping()
        finally:
            await store.close()

    try:
        reachable = asyncio.run(answers())
    except WinnowError as error:
        yield Finding("problem", "redis", str(error))
        return
    if reachable:
        yield Finding("ok", "redis", f"{masked(url)} answers")
    else:
        yield Finding(
            "problem", "redis", f"{masked(url)} does not answer", "start it, correct metadata.redis_url, or leave that empty"
        )


def doctor(
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine and installation, and say what to do about each problem. Changes nothing.

    Ends with code 1 when there is a problem; notes are things that only matter if you want what they name.
    """
    with reported(as_json=as_json):
        loaded = load_config(config)
        with stderr.status("looking around") if stderr.is_terminal and not as_json else nullcontext():
            server_findings = checks.guarded(server, "server")
            running = server_findings[0].level == "ok"
            findings = [
                *checks.guarded(checks.machine, "machine"),
                *checks.guarded(checks.packages, "packages"),
                *checks.guarded(checks.devices, "device"),
                *checks.guarded(checks.extras, "extras"),
                *checks.guarded(checks.plug_ins, "methods"),
                *checks.guarded(partial(checks.default_methods, loaded), "default methods"),
                *checks.guarded(partial(checks.room, loaded), "room"),
                *checks.guarded(partial(checks.port, loaded, running=running), "port"),
                *checks.guarded(partial(redis, loaded), "redis"),
                *server_findings,
            ]
        problems = sum(finding.level == "problem" for finding in findings)
        if as_json:
            print_json({"problems": problems, "findings": findings})
        else:
            shown = table("", "", "what", "found")
            for finding in findings:
                remedy = f"\n[dim]→ {finding.remedy}[/]" if finding.remedy else ""
                shown.add_row(_MARKS[finding.level], finding.topic, finding.text.replace("[", r"\[") + remedy)
            stdout.print(shown)
            stdout.print(f"\n[bold red]{problems} problems[/]" if problems else "\n[green]no problems[/]")
        if problems:
            raise SystemExit(FAILED)

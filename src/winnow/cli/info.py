"""`winnow status`, `winnow methods`, `winnow models`: look at a running pipeline."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

from winnow.cli.exits import reported
from winnow.cli.options import Address, AsJson, TlsCa, Token
from winnow.cli.screen import bytes_text, print_json, stderr, stdout, table

_STATES = {"serving": "green", "starting": "yellow", "draining": "yellow", "lost": "red", "refused": "red"}
SLOTS = ("prefill", "decode", "draft", "ranker", "index")


def status(address: Address = None, token: Token = None, tls_ca: TlsCa = None, as_json: AsJson = False) -> None:
    """Show the gateway, its queue, every worker with its load and KV, and open sessions."""
    with reported(as_json=as_json):
        from winnow.cli.connect import connect

        with connect(address, token, tls_ca) as client:
            now = client.status()
        if as_json:
            print_json(now)
            return
        stdout.print(
            f"[bold {_STATES.get(now.state, '')}]{now.state}[/]  winnow {now.version}, up {_span(now.uptime_s)}, "
            f"{now.inflight} running, {now.queued} waiting, metadata: {now.metadata}\n"
        )
        shown = table(
            "", "worker", "state", "roles", "process", "running", "waiting", "KV held", right=("running", "waiting", "KV held")
        )
        for worker in now.workers:
            color = _STATES.get(worker.state, "")
            state = f"[{color}]{worker.state}[/]" if color else worker.state
            if worker.reason:
                state += f" {escape(worker.reason)}"
            kv = f"{bytes_text(worker.kv_bytes)} of {bytes_text(worker.kv_budget_bytes)}" if worker.kv_budget_bytes else "-"
            cells = (worker.info.worker_id, state, " ".join(worker.info.roles), str(worker.info.pid))
            shown.add_row(*cells, str(worker.running), str(worker.waiting), kv)
        stdout.print(shown)
        if now.sessions:
            sessions = table("\nsessions", "id", "tokens", "prefill", "left", right=("tokens",))
            for session in now.sessions:
                sessions.add_row(session.session_id, str(session.tokens), session.prefill, _span(session.idle_left_s))
            stdout.print(sessions)


def methods(
    slot: Annotated[str, typer.Option(help=f"Only one kind: {', '.join(SLOTS)}.")] = "",
    address: Address = None,
    token: Token = None,
    tls_ca: TlsCa = None,
    as_json: AsJson = False,
) -> None:
    """List the methods of every kind, what each can do, and its parameters with their defaults."""
    with reported(as_json=as_json):
        from winnow.cli.connect import connect
        from winnow.errors import InvalidRequest

        if slot and slot not in SLOTS:
            raise InvalidRequest(f"--slot: unknown kind {slot!r:.40} (known: {', '.join(SLOTS)})")
        with connect(address, token, tls_ca) as client:
            found = list(client.methods(slot))
        if as_json:
            print_json(found)
            return
        for kind in SLOTS:
            listed = [method for method in found if method.slot == kind]
            if listed:
                shown = table(f"\n{kind}", "", "")
                shown.show_header = False
                for method in listed:
                    shown.add_row(f"[bold]{method.name}[/]", _description(method))
                stdout.print(shown)


_TRAINING = {"calibration": "calibrated for each model", "model": "for models trained with it"}


def _description(method: Any) -> str:
    """A method's line for people, what it can do, its parameters, and what steps in for it."""
    traits = ["exact" if method.exact else "approximate", "prefix-safe" if method.prefix_safe else "not prefix-safe"]
    traits += [f"needs {role}" for role in sorted(method.needs)]
    traits += [_TRAINING[method.training]] if method.training else []
    traits += [f"falls back to {method.fallback}"] if method.fallback else []
    text = f"{escape(method.notes)}\n[dim]{', '.join(traits)}[/]"
    if method.defaults:
        parameters = "  ".join(f"{key}={_short(value)}" for key, value in sorted(method.defaults.items()))
        text += f"\n[cyan]{escape(parameters)}[/]"
    if method.unavailable:
        text += f"\n[red]cannot be used: {escape(method.unavailable)}[/]"
    return text


def _short(value: str) -> str:
    """A default on one line: texts with blanks are quoted, long ones cut."""
    if len(value) > 30:
        value = value[:27] + "..."
    return value if value and not any(c.isspace() for c in value) else repr(value)


def models(address: Address = None, token: Token = None, tls_ca: TlsCa = None, as_json: AsJson = False) -> None:
    """List the models being served."""
    with reported(as_json=as_json):
        from winnow.cli.connect import connect

        with connect(address, token, tls_ca) as client:
            found: list[Any] = list(client.models())
        if as_json:
            print_json(found)
            return
        shown = table("", "name", "family", "dtype", "parameters", "context", "fingerprint", right=("parameters", "context"))
        for model in found:
            size = f"{model.parameters / 1e6:,.0f} M"
            shown.add_row(model.name, model.family, model.dtype, size, str(model.max_context_tokens), model.fingerprint[:12])
        stdout.print(shown)
        if not found:
            stderr.print("[yellow]no model is loaded[/]")


def _span(seconds: float) -> str:
    """Seconds for people: 42 s, 3 min, 5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.0f} h"

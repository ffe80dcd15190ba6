"""`winnow generate`: text after a prompt, or an answer about a long text."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from winnow.cli.exits import reported
from winnow.cli.options import Address, AsJson, TimeoutS, TlsCa, Token
from winnow.cli.screen import print_json, stage_bars, stderr
from winnow.errors import InvalidRequest
from winnow.types import Chunk, Message, Sampling, Usage

if TYPE_CHECKING:
    from collections.abc import Iterator

METHOD = "NAME or NAME:key=value,... (default: the server's)."


def read_text(name: str) -> str:
    """The text of a file, "-" is standard input.

    Raises:
        InvalidRequest: it cannot be read, or is not UTF-8.
    """
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise InvalidRequest(f"--file: cannot read it: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"--file: not UTF-8 text at byte {error.start}; convert it, for example with iconv") from None


def messages_for(question: str, text: str | None, system: str | None) -> list[Message]:
    """The conversation to send. The text comes first, so that a second question about it finds its KV in the prefix cache."""
    turns = [Message("system", system)] if system else []
    return [*turns, Message("user", f"{text.strip()}\n\n{question}" if text is not None else question)]


def generate(
    question: Annotated[str, typer.Argument(help="The question, or the prompt; - = standard input.")],
    file: Annotated[
        str | None, typer.Option("--file", "-f", help="A text the question is about (UTF-8); - = standard input.")
    ] = None,
    session: Annotated[str | None, typer.Option(help="Ask about the text of this open session.", show_default=False)] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Open a session for --file and print its id for --session.")] = False,
    system: Annotated[str | None, typer.Option(help="System message.", show_default=False)] = None,
    answer_prefix: Annotated[str, typer.Option("--answer-prefix", help="Words the answer begins with.")] = "",
    raw: Annotated[bool, typer.Option("--raw", help="Send the prompt as it is, without the model's chat template.")] = False,
    prefill: Annotated[str, typer.Option(help=f"Prefill method, {METHOD}")] = "",
    recall: Annotated[
        float | None,
        typer.Option(help="Share of attention mass the prefill keeps, above 0 to 1: prefill method recall.", show_default=False),
    ] = None,
    decode: Annotated[str, typer.Option(help=f"Decode method, {METHOD}")] = "",
    reducer: Annotated[str, typer.Option(help="Prompt reducer, NAME or NAME:key=value,... (default: none).")] = "",
    strict: Annotated[bool, typer.Option("--strict", help="Refuse instead of falling back to the exact path.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Most new tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 = always the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Smallest set of tokens with this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="The k most likely tokens; 0 = all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the most likely one.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling; -1 = drawn by the server.")] = -1,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.")] = None,
    logprobs: Annotated[int, typer.Option(help="With --json: log-probabilities of the n most likely tokens.")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end token, to --max-tokens.")] = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Neither read nor write the prefix cache.")] = False,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print the text as it comes, or at the end.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only the text: no progress, no figures.")] = False,
    address: Address = None,
    token: Token = None,
    tls_ca: TlsCa = None,
    timeout: TimeoutS = None,
    as_json: AsJson = False,
) -> None:
    """Answer a question, about a text with --file, or continue a prompt with --raw. Ctrl-C stops the work on the server too."""
    with reported(as_json=as_json):
        _check_combination(question, file, session, keep, raw, system)
        sampling = Sampling(
            temperature, top_p, top_k, min_p, seed, max_tokens, tuple(stop or ()), logprobs, ignore_eos
        ).validate()
        text = read_text(file) if file is not None else None
        asked = sys.stdin.read() if question == "-" else question
        if not asked.strip():
            raise InvalidRequest("question: empty; ask something, or give the prompt to continue with --raw")
        from winnow.cli.connect import connect
        from winnow.client_calls import with_recall

        chosen = with_recall(prefill or None, recall, session or "", label="--recall")
        options: dict[str, Any] = {
            "prefill": None if keep else chosen,  # the session that is opened takes it
            "decode": decode or None,
            "reducer": reducer or None,
            "strict": strict,
        }
        options |= {"sampling": sampling, "answer_prefix": answer_prefix, "no_cache": no_cache, "deadline_s": timeout}
        with connect(address, token, tls_ca) as client:
            if keep and text is not None:
                with stage_bars(shown=not (as_json or quiet)) as on_stage:
                    opened = client.open_session(
                        text, prefill=chosen, on_progress=lambda done, total: on_stage("prefill", done, total)
                    )
                session = opened.session_id
                read = f"{opened.tokens} tokens" + (
                    f", recall {opened.recall:.3f} of what was computed" if opened.HasField("recall") else ""
                )
                stderr.print(f'session [bold]{session}[/] ({read}): winnow generate --session {session} "..."')
            if session is not None:
                chunks = client.generate(session=session, question=asked, **options)
            elif raw:
                chunks = client.generate(asked if text is None else text + asked, **options)
            else:
                chunks = client.generate(messages=messages_for(asked, text, system), **options)
            show(chunks, stream=stream, quiet=quiet, as_json=as_json, session=session)


def _check_combination(question: str, file: str | None, session: str | None, keep: bool, raw: bool, system: str | None) -> None:
    if question == "-" and file == "-":
        raise InvalidRequest("--file: standard input can be the text or the question, not both")
    if session is not None and (file is not None or raw or system):
        raise InvalidRequest("--session: the session has its text already; leave out --file, --raw and --system")
    if keep and file is None:
        raise InvalidRequest("--keep: needs the text to keep, --file")
    if raw and system:
        raise InvalidRequest("--raw: a prompt without the chat template has no system message; put it into the prompt")


def show(chunks: Iterator[Chunk], *, stream: bool, quiet: bool, as_json: bool, session: str | None) -> None:
    """Print a generation as it comes; whatever ends it early ends the call, which cancels the work on the server."""
    kept: list[Chunk] = []
    bars = stage_bars(shown=not (as_json or quiet))
    on_stage = bars.__enter__()
    waiting = True
    try:
        for chunk in chunks:
            kept.append(chunk)
            if chunk.stage:
                on_stage(chunk.stage, chunk.done, chunk.total)
            if waiting and (chunk.text or chunk.finish_reason):
                bars.__exit__(None, None, None)
                waiting = False
            if stream and not as_json and chunk.text:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
    finally:
        if waiting:
            bars.__exit__(None, None, None)
        close = getattr(chunks, "close", None)
        if close is not None:
            close()
    text = "".join(chunk.text for chunk in kept)
    reason = next((chunk.finish_reason for chunk in reversed(kept) if chunk.finish_reason), "")
    usage = next((chunk.usage for chunk in reversed(kept) if chunk.usage is not None), Usage())
    if as_json:
        found = [[asdict(item) for item in token] for chunk in kept for token in chunk.logprobs]
        extra = {"logprobs": found} if found else {}
        print_json({"text": text, "finish_reason": reason, "usage": asdict(usage), "session_id": session, **extra})
        return
    sys.stdout.write("\n" if stream else text + "\n")
    sys.stdout.flush()
    if not quiet:
        stderr.print(f"[dim]{escape(figures(usage, reason))}[/]")
        if usage.fallback_used:
            stderr.print(f"[yellow]fell back: {escape(usage.fallback_used)}[/]")


def figures(usage: Usage, reason: str) -> str:
    """What a generation cost and read, on one line."""
    speed = (usage.completion_tokens - 1) / usage.decode_s if usage.decode_s > 0 and usage.completion_tokens > 1 else 0.0
    parts = [
        f"{usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached)",
        f"first token {usage.ttft_s:.2f} s",
        f"{usage.completion_tokens} tokens at {speed:.1f}/s",
        _prefill_figures(usage),
        f"keys read {usage.keys_read_share:.0%}",
        f"ended by {reason}",
    ]
    if usage.reduced_from_tokens:
        parts.insert(1, f"reduced from {usage.reduced_from_tokens}")
    return " · ".join(parts)


def _prefill_figures(usage: Usage) -> str:
    """Density and recall with what they are of: cached tokens have no part in them, and their KV may be approximate."""
    if not usage.computed_tokens:
        return "prefill: " + (f"all {usage.cached_tokens} tokens from the cache" if usage.cached_tokens else "nothing to compute")
    text = f"prefill density {usage.prefill_density:.2f}"
    if usage.prefill_recall is not None:
        text += f" at recall {usage.prefill_recall:.3f}"
    if usage.cached_tokens:
        text += f" of the {usage.computed_tokens} tokens computed"
    if usage.prefill_dense_share:
        text += f" ({usage.prefill_dense_share:.0%} dense, where sparse would not pay)"
    return text

"""`winnow calibrate`: make what a prefill method has to learn about a model before it can be used with it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from winnow.cli.exits import reported
from winnow.cli.options import AsJson
from winnow.cli.screen import bytes_text, print_json, stage_bars, stderr, stdout, table
from winnow.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterable


def calibrate(
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help="A method that learns: seerattention, duoattention, sale, sea or dhsa-v1.")
    ],
    model: Annotated[str, typer.Option(help="Folder, .gguf file, hub id, or default.")] = "default",
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", metavar="KEY=VALUE", help="Of the method's training, may be repeated; an unknown one lists them."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of texts, initial values and order.", min=0)] = 0,
    dtype: Annotated[str, typer.Option(help="auto, fp32, fp16 or bf16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Learn a method's thresholds, gates or head classes for a model, and keep them where pipelines on this machine look.

    Stopped with Ctrl-C or killed, the same command goes on where it was.

    Running pipelines use the result from their next request on.
    """
    with reported(as_json=as_json):
        options = parse_pairs(option or ())
        from winnow.workers.model.loader import load_model
        from winnow.workers.prefill import calibration
        from winnow.workers.prefill.training import forget, trainer
        from winnow.workers.prefill.training.options import need_seed

        train = trainer(method)  # before a model is loaded for nothing, and so the seed
        need_seed(method, seed)
        started = time.monotonic()
        with stage_bars(shown=not as_json) as on_stage:
            loaded = load_model(model, dtype=dtype, device=device, on_progress=on_stage)
            try:
                tensors, made = train(
                    loaded, on_progress=lambda done, total: on_stage("calibrating", done, total), seed=seed, **options
                )
                seconds = time.monotonic() - started
                made["took"] = f"{seconds:.0f} s on {loaded.decoder.device.type}, since it was last begun, loading included"
                path = calibration.save(method, loaded.fingerprint, tensors, made)
            except OSError as error:
                raise InvalidRequest(
                    f"WINNOW_HOME: cannot write to its folder calibration ({error.strerror}); make room there or choose another; "
                    "what is learnt so far is kept, the same command goes on"
                ) from None
        forget(method, loaded.fingerprint, seed=seed, **options)
        size = path.stat().st_size
        if as_json:
            result = {"method": method, "model": loaded.name, "fingerprint": loaded.fingerprint, "path": str(path)}
            print_json({**result, "size_bytes": size, "seconds": round(seconds, 1), "made": made})
            return
        shown = table("", "", "")
        shown.show_header = False
        for name, text in made.items():
            shown.add_row(f"[dim]{escape(name.replace('_', ' '))}[/]", escape(text))
        stdout.print(shown)
        stdout.print(f"\n[green]{escape(method)} is calibrated for[/] [bold]{escape(loaded.name)}[/] in {seconds:.0f} s")
        stdout.print(f"{path}  ({bytes_text(size)})", markup=False, soft_wrap=True)
        stderr.print(f'[dim]try   winnow generate --prefill {escape(method)} --file TEXT "QUESTION"[/]')


def parse_pairs(pairs: Iterable[str]) -> dict[str, object]:
    """Texts "key=value" by key; a value that reads as a whole number, a number or true or false becomes that.

    Raises:
        InvalidRequest: no "=", or a key given twice.
    """
    options: dict[str, object] = {}
    for pair in pairs:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not key:
            raise InvalidRequest(f"--option: expected key=value, for example steps=200, got {pair!r:.40}")
        if key in options:
            raise InvalidRequest(f"--option: {key} is given twice; give it once")
        options[key] = _value(value)
    return options


def _value(text: str) -> object:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text

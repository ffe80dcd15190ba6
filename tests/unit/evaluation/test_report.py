"""The report holds every method, needs nothing from outside, and says what the cells say."""

from __future__ import annotations

import base64
import json
import re
import xml.etree.ElementTree as ET
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
from winnow.orchestration.evaluation.summary import summarise
from winnow.workers.model.loader import LoadedModel

pytestmark = pytest.mark.slow

FLEX = ("flexprefill:block=32,gamma=0.5,min_budget=64", "flexprefill:block=64,gamma=0.9,min_budget=64")
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
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
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
    found = Evaluation(tiny, grid).run(tmp_path_factory.mktemp("cells"))
    refused = [
        {"key": f"{r['key']}x", "method": "<odd> & refused", "unsupported": "not < 3 & \"quoted\"",
         **{name: r[name] for name in ("task", "length", "seed", "asked_depth", "depth")}}
        for r in found if r["method"] == "dense"
    ]  # fmt: skip
    return [*found, *refused]


@pytest.fixture(scope="module")
def written(tiny: LoadedModel, records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_report(tmp_path_factory.mktemp("report"), environment(tiny), records)


def test_the_page_is_html_that_names_every_method_and_reason(written: tuple[Path, Path]) -> None:
    page = Page(written[1].read_text())
    for name in ("dense", *FLEX, "<odd> & refused", 'not < 3 & "quoted"'):
        assert name in page.texts
    for title in ("500 tokens", "700 tokens", "needle", "key-value"):
        assert title in page.texts


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
    assert data["environment"] == environment(tiny)
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

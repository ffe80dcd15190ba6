"""The line under an answer: what it says of the prefill is true of cached tokens too."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from winnow.cli.ask import figures
from winnow.orchestration.demo import view
from winnow.orchestration.demo.answering import Answer
from winnow.types import Usage


@pytest.mark.parametrize(
    ("usage", "said"),
    [
        (Usage(4350, 0, prefill_density=0.7, prefill_recall=0.985), "prefill density 0.70 at recall 0.985"),
        (Usage(4350, 4349), "prefill: all 4349 tokens from the cache"),
        (
            Usage(4350, 4096, prefill_recall=1.0, prefill_dense_share=1.0),
            "prefill density 1.00 at recall 1.000 of the 253 tokens computed (100% dense, where sparse would not pay)",
        ),
        (Usage(1, 0), "prefill: nothing to compute"),
    ],
)
def test_density_and_recall_are_said_of_the_tokens_that_were_computed(usage: Usage, said: str) -> None:
    assert said in figures(usage, "eos").split(" · ")


def test_the_demo_shows_no_density_where_nothing_was_computed() -> None:
    screen = io.StringIO()
    pair = [Answer("q", "sparse", "a", 0.1, 9.0, None, usage) for usage in (Usage(700, 0, prefill_density=0.4), Usage(700, 699))]
    view.answers(Console(file=screen, width=80), "q", pair)
    (row,) = [line.split() for line in screen.getvalue().splitlines() if "prefill density" in line]
    assert row[-2:] == ["0.400", "-"]

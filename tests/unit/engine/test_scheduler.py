from __future__ import annotations

import pytest

from winnow.workers.prefill.scheduler import Scheduler


def run(scheduler: Scheduler[str], step: int, left: dict[str, int], steps: int) -> list[str]:
    """Run `steps` steps of `step` units; finished items leave."""
    order = []
    for _ in range(steps):
        item = scheduler.pick()
        if item is None:
            break
        order.append(item)
        work = min(step, left[item])
        left[item] -= work
        scheduler.ran(item, work, left[item])
        if not left[item]:
            scheduler.remove(item)
    return order


@pytest.mark.promise("R2")
def test_a_short_job_goes_before_the_rest_of_a_long_one() -> None:
    scheduler: Scheduler[str] = Scheduler()
    left = {"long": 1000, "short": 20}
    scheduler.add("long", 1000)
    order = run(scheduler, 10, left, 3)
    scheduler.add("short", 20)
    order += run(scheduler, 10, left, 3)
    assert order == ["long"] * 3 + ["short", "short", "long"]


@pytest.mark.promise("R2")
def test_a_long_job_is_not_starved_by_an_endless_stream_of_short_ones() -> None:
    scheduler: Scheduler[str] = Scheduler()
    left = {"long": 800}
    scheduler.add("long", 800)
    steps, n = 0, 0
    while left["long"] and steps < 10_000:
        if len(scheduler) < 3:  # there are always short ones waiting
            n += 1
            left[f"short-{n}"] = 10
            scheduler.add(f"short-{n}", 10)
            continue
        run(scheduler, 10, left, 1)
        steps += 1
    assert left["long"] == 0
    assert 700 // 10 < steps <= 9 * 800 // 10  # one unit in eight is its share


def test_a_fair_step_never_comes_twice_in_a_row_before_a_short_job() -> None:
    scheduler: Scheduler[str] = Scheduler()
    left = {"long": 10_000, **{f"s{i}": 10 for i in range(100)}}
    scheduler.add("long", 10_000)
    for i in range(100):
        scheduler.add(f"s{i}", 10)
    order = run(scheduler, 10, left, 100)
    assert ["long", "long"] not in [order[i : i + 2] for i in range(len(order) - 1)]


def test_equal_jobs_finish_in_the_order_they_came() -> None:
    scheduler: Scheduler[str] = Scheduler()
    left = {"a": 30, "b": 30}
    scheduler.add("a", 30)
    scheduler.add("b", 30)
    finished = [item for item in run(scheduler, 10, left, 6) if left[item] == 0]
    assert finished[0] == "a"

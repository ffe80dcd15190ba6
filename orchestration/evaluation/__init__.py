"""The yardstick: prefill methods in a real model, on prompts with known answers, always beside dense attention.

`runner` walks the grid of methods and prompts, `cell` runs one of them, `metrics` says what a plan kept of one layer's
attention, `report` makes the page. Tasks are plug-ins (`task`); `capture` keeps real q, k and v for benchmarks.
"""

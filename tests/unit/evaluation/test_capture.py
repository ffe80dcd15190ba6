"""Captured tensors are those the layers really saw."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from winnow.errors import ContextTooLong, CorruptBlock, InvalidRequest, UnknownName
from winnow.orchestration.evaluation.capture import capture, capture_bytes, load_capture, parse_layers
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.executor import attend_plan
from winnow.workers.model.loader import LoadedModel
from winnow.workers.model.rope import RopeTable, rotate

IDS = tuple(torch.randint(3, 259, (150,), generator=torch.Generator().manual_seed(0)).tolist())


class Watching:
    """Plain dense attention that keeps what it is given: the reference."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[Tensor, Tensor, Tensor, RawQK]] = {}

    def attend(self, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, raw: RawQK) -> Tensor:
        self.seen[layer.idx] = (q.clone(), k.clone(), v.clone(), RawQK(raw.q.clone(), raw.k.clone()))
        out, _ = attend_plan(None, q[None], k[None], v[None], scale=layer.scale)
        return out[0]


def test_what_is_loaded_is_what_the_layers_saw(tiny: LoadedModel, tmp_path: Path) -> None:
    path = capture(tiny, IDS, [0, 1], tmp_path / "c.safetensors", text="random")
    watching = Watching()
    tiny.decoder.forward(torch.tensor(IDS), torch.arange(150), watching)
    found = load_capture(path)
    assert list(found.layers) == [0, 1] and found.token_ids.tolist() == list(IDS)
    assert (found.made["fingerprint"], found.made["text"], found.made["dtype"]) == (tiny.fingerprint, "random", "fp32")
    for idx, layer in found.layers.items():
        assert layer.spec == tiny.spec.layers[idx]
        q, k, v, raw = watching.seen[idx]
        for ours, theirs in ((layer.q, q), (layer.k, k), (layer.v, v), (layer.raw_q, raw.q), (layer.raw_k, raw.k)):
            assert ours is not None
            torch.testing.assert_close(ours, theirs)


def test_raw_and_post_rope_differ_by_the_rotation(tiny: LoadedModel, tmp_path: Path) -> None:
    (layer,) = load_capture(capture(tiny, IDS, [1], tmp_path / "c", text="")).layers.values()
    assert layer.raw_q is not None and layer.raw_k is not None
    rope = tiny.spec.ropes[tiny.spec.layer_ropes[1]]
    cos, sin = RopeTable(rope, 150, torch.float32, torch.device("cpu")).rows(torch.arange(150))
    for turned, raw in ((layer.q, layer.raw_q), (layer.k, layer.raw_k)):
        torch.testing.assert_close(rotate(raw.transpose(0, 1), cos, sin).transpose(0, 1), turned)
    assert not torch.allclose(layer.q, layer.raw_q)


def test_only_what_was_asked_for_is_kept(tiny: LoadedModel, tmp_path: Path) -> None:
    path = capture(tiny, IDS, [1], tmp_path / "c", text="", with_raw=False)
    (layer,) = load_capture(path).layers.values()
    assert (layer.raw_q, layer.raw_k) == (None, None)
    size = capture_bytes(tiny, 150, 1, False)
    assert size == sum(x.numel() * 4 for x in (layer.q, layer.k, layer.v))
    assert size <= path.stat().st_size <= size + 8192
    with pytest.raises(UnknownName, match=r"no layer 0 in the file \(it holds: 1\)"):
        load_capture(path, layers=[0])


def test_a_broken_or_foreign_file_is_refused(tiny: LoadedModel, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = capture(tiny, IDS, [0], tmp_path / "c", text="")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CorruptBlock, match="damaged"):
        load_capture(path)
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(CorruptBlock, match="not a capture"):
        load_capture(tmp_path / "other")
    with pytest.raises(UnknownName, match="winnow capture"):
        load_capture(tmp_path / "nothing")


def test_impossible_captures_are_refused_and_leave_nothing(tiny: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(ContextTooLong, match="takes 2048 tokens, got 2049"):
        capture(tiny, [5] * 2049, [0], tmp_path / "c", text="")
    with pytest.raises(InvalidRequest, match="--out: must be a file in a folder"):
        capture(tiny, IDS, [0], tmp_path / "no" / "c", text="")
    with pytest.raises(InvalidRequest, match="--out: must be a file in a folder"):
        capture(tiny, IDS, [0], tmp_path, text="")
    huge = replace(tiny, spec=replace(tiny.spec, head_size=1 << 40))
    with pytest.raises(InvalidRequest, match=r"MiB free; choose fewer --layers"):
        capture(huge, IDS, [0], tmp_path / "c", text="")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "layers"), [("all", [0, 1, 2, 3, 4, 5]), ("0,4", [0, 4]), ("1-3,5", [1, 2, 3, 5]), ("-1", [5]), (" 2 , -6 ", [0, 2])]
)
def test_layers_are_lists_and_ranges(text: str, layers: list[int]) -> None:
    assert parse_layers(text, 6) == layers


@pytest.mark.parametrize(("text", "range_"), [("0,5-3", "5-3"), ("5-3", "5-3"), ("1 , 2-0 ,3", "2-0")])
def test_a_range_that_ends_below_its_start_is_refused_by_name(text: str, range_: str) -> None:
    low, high = sorted(range_.split("-"))
    with pytest.raises(InvalidRequest, match=f"--layers: the range '{range_}' ends below its start; write {low}-{high}"):
        parse_layers(text, 6)


@pytest.mark.parametrize("text", ["", "6", "-7", "a", "3-1", "0,,1", "1-9"])
def test_wrong_layers_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape("--layers: ")):
        parse_layers(text, 6)

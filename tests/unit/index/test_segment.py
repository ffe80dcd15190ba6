"""KVSegment: one file, several processes, and no bytes that are not what was sealed."""

from __future__ import annotations

import dataclasses
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from winnow.config import KVConfig
from winnow.errors import ConfigError, CorruptBlock, InvalidRequest, LeaseLost, Overloaded
from winnow.index.folder import candidate_folders, choose_folder, make_private, open_handle
from winnow.index.segment import KVSegment, SegmentLayout, segment_bytes
from winnow.index.transfer import CHUNK_BYTES, Chunk, SegmentReceiver
from winnow.types import SegmentHandle

from .kv_fill import TINY, assert_holds, fill, rows

TOKENS = list(range(100, 123))


def sealed(folder: Path | None, layout: SegmentLayout = TINY, tokens: list[int] = TOKENS, tail: int = 5) -> KVSegment:
    segment = KVSegment.create(layout, len(tokens) + tail, dir=folder)
    fill(segment, tokens)
    segment.seal()
    return segment


def handle_of(segment: KVSegment) -> SegmentHandle:
    return SegmentHandle(
        segment.segment_id, "prefill-0", 1, "host", segment.location, segment.n_tokens, segment.capacity,
        segment.layout.digest(), segment.checksum, 1,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("in_file", [True, False])
def test_what_is_written_is_read_back_in_every_dtype(folder: Path, dtype: str, in_file: bool) -> None:
    layout = dataclasses.replace(TINY, dtype=dtype)
    segment = sealed(folder if in_file else None, layout)
    segment.check()
    segment.verify()
    assert_holds(segment, TOKENS)
    assert (segment.n_tokens, segment.n_total, segment.capacity) == (23, 23, 28)
    assert torch.equal(segment.k(1)[:, :23], rows(layout, TOKENS)[1, 0])
    assert torch.equal(segment.v(1)[:, :23], rows(layout, TOKENS)[1, 1])


def test_views_share_memory_with_the_file(folder: Path) -> None:
    ours = sealed(folder)
    theirs = KVSegment.open(folder, ours.location)
    ours.k(0)[1, 25] = 7.0
    assert theirs.k(0)[1, 25].tolist() == [7.0] * 16
    ours.k(0)[1, 25].data_ptr()
    assert ours.k(0).data_ptr() == ours.kv.data_ptr()


def test_a_read_only_mapping_cannot_change_the_owners_bytes(folder: Path) -> None:
    ours = sealed(folder)
    theirs = KVSegment.open(folder, ours.location, writable=False)
    theirs.k(0)[:] = -1.0
    ours.verify()
    assert_holds(ours, TOKENS)


def test_unused_capacity_takes_no_memory_and_files_are_private(folder: Path) -> None:
    segment = KVSegment.create(TINY, 100_000, dir=folder)
    found = os.stat(folder / segment.location)
    assert found.st_size == segment.size_bytes == segment_bytes(TINY, 100_000)
    assert found.st_blocks * 512 <= 64 * 1024
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700


def test_another_process_maps_writes_the_tail_and_survives_the_unlink(folder: Path) -> None:
    segment = sealed(folder)
    code = """
import sys
from pathlib import Path
from winnow.index.segment import KVSegment
import torch
s = KVSegment.open(Path(sys.argv[1]), sys.argv[2])
s.verify()
tail = torch.full((2, 1, 16), 0.5)
for layer in range(2):
    s.write(layer, s.n_total, tail, tail)
s.advance([7])
print("written", flush=True)
sys.stdin.readline()  # the owner unlinks meanwhile
s.verify()
print(s.n_tokens, s.n_total, float(s.k(1)[0, 23].sum()), flush=True)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), segment.location], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    watchdog = threading.Timer(90, child.kill)  # readline below must not wait for ever
    watchdog.start()
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "written\n"
        assert (segment.n_tokens, segment.n_total, segment.token_ids[-1]) == (23, 24, 7)
        assert segment.k(1)[0, 23].tolist() == [0.5] * 16
        segment.verify()
        segment.unlink()
        segment.close()
        out, _ = child.communicate("\n", timeout=60)
        assert out == "23 24 8.0\n"
    finally:
        watchdog.cancel()
        child.kill()
        child.wait()
    assert not list(folder.glob("*.kv"))


def test_sealing_a_grown_tail_keeps_the_earlier_checksum_in_the_chain(folder: Path) -> None:
    segment = sealed(folder)
    first = handle_of(segment)
    fill(segment, [*TOKENS, 1, 2])
    second = segment.seal()
    assert second != first.checksum
    assert second == segment.seal() == segment.checksum
    segment.verify()
    KVSegment.open(folder, segment.location, expect=first)
    with pytest.raises(InvalidRequest, match="sealed 25"):
        segment.write(0, 24, torch.zeros(2, 1, 16), torch.zeros(2, 1, 16))


def test_the_checksum_depends_on_the_tokens_the_bytes_and_the_layout() -> None:
    sums = {sealed(None).checksum, sealed(None, dataclasses.replace(TINY, dtype="bf16")).checksum}
    sums.add(sealed(None, tokens=[1, *TOKENS[1:]]).checksum)
    other_ids = KVSegment.create(TINY, 23)
    for layer in range(2):
        kv = rows(TINY, TOKENS)[layer]
        other_ids.write(layer, 0, kv[0], kv[1])
    other_ids.advance([9, *TOKENS[1:]])
    sums.add(other_ids.seal())
    assert len(sums) == 4


@pytest.mark.promise("R21")
@pytest.mark.parametrize("where", ["k", "v", "ids"])
def test_one_flipped_bit_is_noticed(folder: Path, where: str) -> None:
    segment = sealed(folder)
    target = {"k": segment.k(0), "v": segment.v(1), "ids": torch.from_numpy(segment._ids)}[where]
    bits = target.view(torch.int32).view(-1)
    bits[2] ^= 1 << 9
    with pytest.raises(CorruptBlock, match="do not match their checksum"):
        segment.verify()
    bits[2] ^= 1 << 9
    segment.verify()


@pytest.mark.promise("R21")
def test_swapped_blocks_are_noticed(folder: Path) -> None:
    segment = sealed(folder)
    k = segment.k(0)
    k[0, 0:4], k[0, 4:8] = k[0, 4:8].clone(), k[0, 0:4].clone()
    with pytest.raises(CorruptBlock):
        segment.verify()


@pytest.mark.promise("R21")
@pytest.mark.parametrize("offset", [0, 8, 16, 24, 32, 48, 1030])
def test_a_damaged_header_is_refused(folder: Path, offset: int) -> None:
    segment = sealed(folder)
    with (folder / segment.location).open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x55]))
    with pytest.raises(CorruptBlock):
        KVSegment.open(folder, segment.location)


@pytest.mark.promise("R21")
@pytest.mark.parametrize("keep", [0, 100, 4096, -1])
def test_a_shortened_file_is_refused(folder: Path, keep: int) -> None:
    segment = sealed(folder)
    path = folder / segment.location
    os.truncate(path, keep if keep >= 0 else segment.size_bytes - 1)
    with pytest.raises(CorruptBlock):
        KVSegment.open(folder, segment.location)


@pytest.mark.promise("R21")
@pytest.mark.parametrize(
    "change", [{"segment_id": "x"}, {"kv_layout": "x"}, {"capacity": 27}, {"n_tokens": 24}, {"checksum": "00" * 16}]
)
def test_a_file_that_is_not_the_handles_is_refused(folder: Path, change: dict[str, object]) -> None:
    segment = sealed(folder)
    KVSegment.open(folder, segment.location, expect=handle_of(segment))
    with pytest.raises(CorruptBlock):
        KVSegment.open(folder, segment.location, expect=dataclasses.replace(handle_of(segment), **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "location", ["../x.kv", "/etc/passwd", "a/b.kv", "", ".", "..", ".kv", "x.kv\0", "x.kv\n", "x", "a\\b.kv", "~x.kv"]
)
def test_a_location_that_is_not_a_bare_file_name_is_refused(folder: Path, location: str) -> None:
    sealed(folder)
    with pytest.raises(InvalidRequest, match="bare file name"):
        KVSegment.open(folder, location)


def test_a_link_out_of_the_folder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    segment = sealed(folder)
    outside = tmp_path / "outside.kv"
    os.rename(folder / segment.location, outside)
    (folder / segment.location).symlink_to(outside)
    with pytest.raises(CorruptBlock, match="cannot be opened"):
        KVSegment.open(folder, segment.location)


def test_a_file_that_is_gone_reads_as_a_lost_lease(folder: Path, kv_config: KVConfig) -> None:
    segment = sealed(folder)
    handle = handle_of(segment)
    assert_holds(open_handle(handle, kv_config), TOKENS)
    segment.unlink()
    with pytest.raises(LeaseLost, match="ask for the prompt again"):
        open_handle(handle, kv_config)


def test_what_does_not_fit_is_refused_and_changes_nothing(folder: Path) -> None:
    segment = sealed(folder)
    for start, n in ((22, 1), (23, 6), (0, 1)):
        with pytest.raises(InvalidRequest, match="capacity 28"):
            segment.write(0, start, torch.zeros(2, n, 16), torch.zeros(2, n, 16))
    with pytest.raises(InvalidRequest, match="capacity of 28"):
        segment.advance([1] * 6)
    with pytest.raises(InvalidRequest, match="cut"):
        segment.truncate(22)
    with pytest.raises(InvalidRequest, match="capacity must be"):
        KVSegment.create(TINY, 0)
    with pytest.raises(InvalidRequest, match="mapped file"):
        KVSegment.create(TINY, 1, dir=folder, device="meta")
    segment.verify()


def test_a_folder_without_room_is_refused_with_the_bytes(folder: Path) -> None:
    with pytest.raises(Overloaded, match=r"\d+ bytes needed, \d+ free"):
        KVSegment.create(TINY, 1 << 50, dir=folder)
    assert not list(folder.glob("*.kv"))


def test_a_folder_open_to_others_is_refused(tmp_path: Path) -> None:
    config = KVConfig(dir=str(tmp_path))
    shared = candidate_folders(config)[0]
    shared.mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="0700"):
        choose_folder(config)
    shared.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    shared.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="0700"):
        make_private(shared)


def test_a_copied_prefix_equals_the_source_and_may_grow_differently(folder: Path) -> None:
    source = sealed(folder)
    copy = KVSegment.create(TINY, 40, dir=folder)
    copy.copy_prefix_from(source, 10)
    assert (copy.n_tokens, copy.n_total) == (0, 10)
    fill(copy, [*TOKENS[:10], 5, 6])
    copy.seal()
    assert_holds(copy, [*TOKENS[:10], 5, 6])
    source.verify()
    with pytest.raises(InvalidRequest, match="cannot take"):
        copy.copy_prefix_from(source, 1)
    with pytest.raises(InvalidRequest, match="cannot take"):
        KVSegment.create(TINY, 40).copy_prefix_from(source, 24)
    with pytest.raises(CorruptBlock, match="layout"):
        KVSegment.create(dataclasses.replace(TINY, head_size=8), 40).copy_prefix_from(source, 1)


def test_views_outlive_close() -> None:
    segment = sealed(None)
    k = segment.k(0)
    segment.close()
    assert torch.equal(k[:, :23], rows(TINY, TOKENS)[0, 0])
    assert segment.n_tokens == 23
    with pytest.raises(LeaseLost, match="closed"):
        segment.k(0)


# -- the stream ----------------------------------------------------------------------------------------------------------

WIDE = SegmentLayout(n_layers=3, n_kv_heads=2, head_size=128, dtype="bf16")


@pytest.mark.parametrize("n_tokens", [0, 1, 63, 1500])
def test_a_streamed_segment_equals_its_source(folder: Path, n_tokens: int) -> None:
    tokens = [i % 251 for i in range(n_tokens)]
    source = KVSegment.create(WIDE, n_tokens + 4, query_sample=(4, 3))
    fill(source, tokens[: n_tokens // 2])
    source.seal()
    fill(source, tokens)
    for layer in range(3):
        sample = source.query_sample(layer)
        assert sample is not None
        sample.copy_(torch.full((4, 3, 128), layer + 1.0))
    source.seal()
    chunks = list(source.iter_chunks())
    assert all(len(c.data) <= CHUNK_BYTES for c in chunks)
    assert [c.last for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert len(chunks) >= (4 if n_tokens == 1500 else 1)
    got = KVSegment.from_chunks(chunks, expect=handle_of(source), tail_tokens=9, dir=folder)
    assert (got.n_tokens, got.capacity, got.checksum) == (n_tokens, max(1, n_tokens + 9), source.checksum)
    assert torch.equal(got.kv[:, :, :, :n_tokens], source.kv[:, :, :, :n_tokens])
    assert got.token_ids.tolist() == tokens
    sample = got.query_sample(2)
    assert sample is not None and torch.equal(sample, torch.full((4, 3, 128), 3.0, dtype=torch.bfloat16))
    got.check()
    got.verify()


def _flip(chunk: Chunk) -> Chunk:
    data = bytearray(chunk.data)
    data[5] ^= 1
    return dataclasses.replace(chunk, data=bytes(data))


@pytest.mark.promise("R21")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: [c[0], _flip(c[1]), *c[2:]], "does not match its checksum"),
        (lambda c: [c[0], c[2], c[1], *c[3:]], "expected byte"),
        (lambda c: [c[0], *c[2:]], "expected byte"),
        (lambda c: [c[0], c[0], *c[1:]], "expected byte"),
        (lambda c: c[:-1], "ended before its last chunk"),
        (lambda c: [], "ended before its last chunk"),
        (lambda c: [*c, c[-1]], "after the last one"),
        (lambda c: c[1:], "expected byte"),
        (lambda c: [dataclasses.replace(c[0], header=b""), *c[1:]], "header must come"),
        (lambda c: [dataclasses.replace(c[0], header=b"{}"), *c[1:]], "cannot be read"),
        (lambda c: [c[0], dataclasses.replace(c[1], last=True)], "fewer bytes"),
    ],
)
def test_a_damaged_stream_is_refused_and_leaves_no_file(folder: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    source = sealed(None, WIDE, [i % 97 for i in range(900)])
    chunks = list(source.iter_chunks())
    assert len(chunks) >= 3
    with pytest.raises(CorruptBlock, match=message):
        KVSegment.from_chunks(damage(chunks), dir=folder)
    assert not list(folder.glob("*.kv"))


@pytest.mark.promise("R21")
def test_a_stream_of_another_segment_or_layout_is_refused(folder: Path) -> None:
    source, other = sealed(None), sealed(None, tokens=TOKENS[::-1])
    chunks = list(source.iter_chunks())
    for change in ({"segment_id": "x"}, {"kv_layout": "x"}, {"n_tokens": 3}, {"checksum": other.checksum}):
        with pytest.raises(CorruptBlock, match="the handle says"):
            KVSegment.from_chunks(chunks, expect=dataclasses.replace(handle_of(source), **change), dir=folder)
    # Right chunk checksums over other bytes: only the segment's own checksum can tell.
    theirs = list(other.iter_chunks())
    with pytest.raises(CorruptBlock, match="the bytes do not match"):
        KVSegment.from_chunks([dataclasses.replace(theirs[0], header=chunks[0].header)], dir=folder)
    assert not list(folder.glob("*.kv"))


def test_an_aborted_receiver_removes_its_file(folder: Path) -> None:
    receiver = SegmentReceiver(dir=folder)
    receiver.push(next(sealed(None, WIDE, list(range(900))).iter_chunks()))
    assert len(list(folder.glob("*.kv"))) == 1
    receiver.abort()
    assert not list(folder.glob("*.kv"))


def test_an_unsealed_segment_cannot_be_sent() -> None:
    with pytest.raises(InvalidRequest, match="not sealed"):
        next(KVSegment.create(TINY, 3).iter_chunks())


@pytest.mark.parametrize("field", ["n_layers", "n_kv_heads", "head_size", "version"])
@pytest.mark.parametrize("value", [0, -1, 1.5, 1 << 21])
def test_a_layout_that_cannot_be_is_refused(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=f"layout.{field}"):
        dataclasses.replace(TINY, **{field: value})  # type: ignore[arg-type]


def test_offsets_beyond_two_gigabytes_are_right(folder: Path) -> None:
    layout = SegmentLayout(n_layers=1, n_kv_heads=2, head_size=128, dtype="bf16")
    segment = KVSegment.create(layout, 5_000_000, dir=folder)  # sparse: 5 GB of address space, a few pages of memory
    segment.v(0)[1, -1] = 3.0
    again = KVSegment.open(folder, segment.location)
    assert again.v(0)[1, -1].tolist() == [3.0] * 128
    assert float(again.k(0)[0, -1].sum()) == 0.0
    assert np.asarray(os.stat(folder / segment.location).st_blocks * 512) < 1 << 20

"""A sealed segment as a checksummed stream between hosts, and back.

The stream is, without gaps: token ids int32 [n], then for each layer, K then V, each head's [n, D]; then the query sample.
The first chunk carries a JSON header: layout, n_tokens, the sealed ranges and the checksum that the receiver must reach.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from winnow.errors import CorruptBlock, InvalidRequest
from winnow.index.layout import SegmentLayout
from winnow.index.segment import KVSegment
from winnow.types import SegmentHandle

CHUNK_BYTES = 1 << 20
STREAM_VERSION = 1


@dataclass(frozen=True)
class Chunk:
    """One message of the stream.

    Attributes:
        header: JSON, in the first chunk only.
        offset: byte offset of `data` in the stream.
        data: at most 1 MiB.
        checksum: xxh3-64 of data, unsigned.
        last: nothing follows.
    """

    header: bytes
    offset: int
    data: bytes
    checksum: int
    last: bool


def iter_chunks(segment: KVSegment) -> Iterator[Chunk]:
    """Cut the sealed bytes of `segment` into chunks.

    Raises:
        InvalidRequest: it is not sealed.
    """
    if not segment.is_sealed:
        raise InvalidRequest(f"segment {segment.segment_id}: not sealed, so it cannot be sent")
    n = segment.n_tokens
    sample = segment.query_sample(0)
    header = json.dumps(
        {
            "version": STREAM_VERSION, "segment_id": segment.segment_id, "layout": segment.layout.to_dict(), "n_tokens": n,
            "ends": [end for end, _ in segment._chain()], "checksum": segment.checksum,
            "query_sample": [sample.shape[0], sample.shape[1]] if sample is not None else None,
        },
        sort_keys=True,
    ).encode()  # fmt: skip
    buffer, offset = bytearray(), 0
    for piece in _stream(segment, n):
        view = np.ascontiguousarray(piece).view(np.uint8).reshape(-1).data
        while len(view):
            room = CHUNK_BYTES - len(buffer)
            buffer += view[:room]
            view = view[room:]
            if len(buffer) == CHUNK_BYTES and len(view):
                yield _chunk(header, offset, buffer, last=False)
                offset += len(buffer)
                header, buffer = b"", bytearray()
        if len(buffer) == CHUNK_BYTES:
            yield _chunk(header, offset, buffer, last=False)
            offset += len(buffer)
            header, buffer = b"", bytearray()
    yield _chunk(header, offset, buffer, last=True)


def _chunk(header: bytes, offset: int, buffer: bytearray, *, last: bool) -> Chunk:
    data = bytes(buffer)
    return Chunk(header, offset, data, xxhash.xxh3_64_intdigest(data), last)


def _stream(segment: KVSegment, n: int) -> Iterator[NDArray[Any]]:
    yield segment.token_ids[:n]
    if n:
        yield from segment.pieces(0, n)
    for layer in range(segment.layout.n_layers):
        queries = segment.query_sample(layer)
        if queries is None:
            return
        yield queries.contiguous().cpu().view(torch.uint8).numpy()


class SegmentReceiver:
    """Builds a segment from chunks as they come. `push` each, then `finish`; `abort` on any other way out.

    Args:
        expect: the handle that was asked for: segment id, layout digest, n_tokens and checksum must be its own.
        tail_tokens: capacity to leave behind the sealed tokens.
        dir, device: as in `KVSegment.create`.
    """

    def __init__(
        self, *, expect: SegmentHandle | None = None, tail_tokens: int = 0, dir: Path | None = None,
        device: str | torch.device = "cpu",
    ) -> None:  # fmt: skip
        self._expect, self._tail_tokens, self._dir, self._device = expect, tail_tokens, dir, device
        self._segment: KVSegment | None = None
        self._header: dict[str, Any] = {}
        self._offset = 0
        self._is_last = False
        self._targets: Iterator[tuple[torch.Tensor, int]] = iter(())
        self._target: torch.Tensor | None = None  # uint8 [bytes] still to fill
        self._ids = np.empty(0, np.int32)

    @property
    def size_bytes(self) -> int:
        """Bytes of the segment being built; 0 before the first chunk said how many."""
        return self._segment.size_bytes if self._segment is not None else 0

    def push(self, chunk: Chunk) -> None:
        """Take the next chunk.

        Raises:
            CorruptBlock: out of order, a gap, a wrong checksum, more bytes than announced, or a header that does not fit.
            Overloaded: no room for the segment.
        """
        try:
            self._push(chunk)
        except BaseException:
            self.abort()
            raise

    def _push(self, chunk: Chunk) -> None:
        if self._is_last:
            raise CorruptBlock("segment stream: a chunk after the last one")
        if len(chunk.data) > CHUNK_BYTES:
            raise CorruptBlock(f"segment stream: a chunk of {len(chunk.data)} bytes, at most {CHUNK_BYTES}")
        if xxhash.xxh3_64_intdigest(chunk.data) != chunk.checksum:
            raise CorruptBlock(f"segment stream: chunk at byte {chunk.offset} does not match its checksum")
        if chunk.offset != self._offset:
            raise CorruptBlock(f"segment stream: chunk at byte {chunk.offset}, expected byte {self._offset}")
        if bool(chunk.header) != (self._segment is None):
            raise CorruptBlock("segment stream: the header must come with the first chunk and only there")
        if self._segment is None:
            self._start(chunk.header)
        data = torch.from_numpy(np.frombuffer(chunk.data, np.uint8).copy()) if chunk.data else torch.empty(0, dtype=torch.uint8)
        while len(data):
            if self._target is None or not len(self._target):
                self._target = next((t for t, size in self._targets if size), None)
                if self._target is None:
                    raise CorruptBlock("segment stream: more bytes than its header announces")
            n = min(len(data), len(self._target))
            self._target[:n].copy_(data[:n])
            self._target, data = self._target[n:], data[n:]
        self._offset += len(chunk.data)
        self._is_last = chunk.last

    def _start(self, text: bytes) -> None:
        try:
            header = json.loads(text)
            layout = SegmentLayout(**header["layout"])
            n, ends, sample = int(header["n_tokens"]), [int(e) for e in header["ends"]], header["query_sample"]
            segment_id, checksum = str(header["segment_id"]), str(header["checksum"])
            if int(header["version"]) != STREAM_VERSION:
                raise CorruptBlock(f"segment stream: version {header['version']}, this build reads {STREAM_VERSION}")
            if not ends or ends != sorted(set(ends)) or ends[-1] != n or ends[0] < 0:
                raise ValueError("ends")
            query_sample = (int(sample[0]), int(sample[1])) if sample else None
            if query_sample and min(query_sample) < 1:
                raise ValueError("query_sample")
        except (ValueError, KeyError, TypeError, InvalidRequest):
            raise CorruptBlock("segment stream: its header cannot be read") from None
        if self._expect is not None:
            for name, got, wanted in (
                ("segment_id", segment_id, self._expect.segment_id),
                ("kv_layout", layout.digest(), self._expect.kv_layout),
                ("n_tokens", n, self._expect.n_tokens),
                ("checksum", checksum, self._expect.checksum),
            ):
                if got != wanted:
                    raise CorruptBlock(f"segment stream: {name} is {got}, the handle says {wanted}")
        # The copy gets an id of its own: its file may lie in the same folder as the original.
        self._segment = KVSegment.create(
            layout, max(1, n + self._tail_tokens), dir=self._dir, device=self._device, query_sample=query_sample
        )
        self._header = {"ends": ends, "checksum": checksum}
        self._ids = np.empty(n, np.int32)
        self._targets = self._places(self._segment, n)

    def _places(self, segment: KVSegment, n: int) -> Iterator[tuple[torch.Tensor, int]]:
        """Where the stream's bytes go, in order: (uint8 view, bytes)."""
        yield torch.from_numpy(self._ids.view(np.uint8)), 4 * n
        for layer in range(segment.layout.n_layers):
            for kv in (segment.k(layer), segment.v(layer)):
                for head in kv:
                    flat = head[:n].view(torch.uint8).view(-1)
                    yield flat, flat.numel()
        for layer in range(segment.layout.n_layers):
            queries = segment.query_sample(layer)
            if queries is not None:
                flat = queries.view(torch.uint8).view(-1)
                yield flat, flat.numel()

    def finish(self) -> KVSegment:
        """The sealed segment.

        Raises:
            CorruptBlock: the stream ended early, or the bytes do not reach the announced checksum.
        """
        segment = self._segment
        try:
            if segment is None or not self._is_last:
                raise CorruptBlock("segment stream: it ended before its last chunk")
            if (self._target is not None and len(self._target)) or any(size for _, size in self._targets):
                raise CorruptBlock("segment stream: fewer bytes than its header announces")
            done = 0
            for end in self._header["ends"]:
                segment.advance(self._ids[done:end])
                segment.seal()
                done = end
            if segment.checksum != self._header["checksum"]:
                raise CorruptBlock("segment stream: the bytes do not match the segment's checksum")
        except BaseException:
            self.abort()
            raise
        self._segment = None
        return segment

    def abort(self) -> None:
        """Free what was received. Does nothing after `finish`."""
        if self._segment is not None:
            self._segment.unlink()
            self._segment.close()
            self._segment = None
            self._is_last = True

"""KVSegment: the keys and values of one token sequence, in a file that several processes map, or in plain tensors.

One file holds, in this order, each part starting on a 4 KiB border:

    header       4 KiB: magic, format version, counters, checksums of the sealed ranges, JSON (layout, capacity, ids)
    token ids    int32 [capacity]
    data         [L][K, V][Hkv, capacity, D], dtype of the layout
    queries      [L, Hq, S, D], the same dtype; only where a query sample was asked for (training data of an index)

The file is sparse: capacity that is never written takes no memory. The process that creates a segment (prefill) writes
and seals it; one decoding process writes the tail behind the sealed tokens; any process may read. A mapping lives until
the last tensor over it is gone, so a reader survives the owner's unlink. Nothing here knows about leases: `store.py` does.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from winnow.errors import CorruptBlock, InvalidRequest, LeaseLost, Overloaded
from winnow.index.key_tiles import KeyTiles
from winnow.index.layout import DTYPE_BYTES, SegmentLayout
from winnow.types import SegmentHandle

if TYPE_CHECKING:
    from winnow.index.transfer import Chunk

__all__ = ["KVSegment", "SegmentLayout"]

PAGE = 4096
FORMAT_VERSION = 1
_MAGIC = int.from_bytes(b"WINNOWKV", "little")
# Header words, int64: 0 magic, 1 format version, 2 JSON bytes, 3 JSON xxh3-64, then the counters below.
_N_TOKENS, _N_TOTAL, _N_RANGES = 4, 5, 6
_RANGES_AT, _MAX_RANGES = 256, 32  # each: int64 end token, 16 bytes xxh3-128
_JSON_AT = 1024


def _pages(size_bytes: int) -> int:
    return -(-size_bytes // PAGE) * PAGE


class KVSegment:
    """Keys and values of up to `capacity` tokens. Made by `create`, `open` or `from_chunks`.

    One writer per region: the creator until `seal`, then one holder of the tail. Readers of sealed tokens need no lock.

    Attributes:
        segment_id: unique name, chosen at creation.
        layout: see SegmentLayout.
        capacity: tokens that fit.
        path: the mapped file; None for plain tensors ("local"), which no other process can map.
        size_bytes: bytes at full capacity, what a budget counts.
        key_tiles: what a selector computed of the keys, in this process only; it is neither in the file nor in a stream.
    """

    def __init__(
        self, layout: SegmentLayout, capacity: int, segment_id: str, query_sample: tuple[int, int] | None,
        meta: NDArray[np.uint8], data: Tensor, path: Path | None,
    ) -> None:  # fmt: skip
        self.layout = layout
        self.capacity = capacity
        self.segment_id = segment_id
        self.path = path
        self.device = data.device
        self.key_tiles = KeyTiles()
        self.size_bytes, _, _ = _sizes(layout, capacity, query_sample)
        self._meta: NDArray[np.uint8] = meta
        self._words: NDArray[np.int64] = meta[:_RANGES_AT].view(np.int64)
        self._ids: NDArray[np.int32] = meta[PAGE : PAGE + 4 * capacity].view(np.int32)
        self._raw: Tensor | None = data
        kv_bytes = layout.bytes_per_token * capacity
        typed = data[:kv_bytes].view(layout.torch_dtype)
        self._kv: Tensor | None = typed.view(layout.n_layers, 2, layout.n_kv_heads, capacity, layout.head_size)
        self._queries: Tensor | None = None
        if query_sample is not None:
            hq, s = query_sample
            at = _pages(kv_bytes)
            size = layout.n_layers * hq * s * layout.row_bytes
            self._queries = data[at : at + size].view(layout.torch_dtype).view(layout.n_layers, hq, s, layout.head_size)

    # -- making and opening ------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls, layout: SegmentLayout, capacity: int, *, dir: Path | None = None, device: str | torch.device = "cpu",
        query_sample: tuple[int, int] | None = None, segment_id: str = "",
    ) -> KVSegment:  # fmt: skip
        """An empty segment for `capacity` tokens.

        Args:
            dir: folder of the file (see `folder.py`); None keeps the bytes in plain tensors of this process.
            device: for plain tensors; a file is always in host memory, so dir with another device is refused.
            query_sample: (Hq, S): also keep S query vectors of each query head and layer.
            segment_id: letters, digits, "-", "_" and "."; "" draws one.

        Raises:
            InvalidRequest: capacity below 1, or dir together with a device other than the CPU.
            Overloaded: the folder has no room for the bytes.
        """
        if capacity < 1:
            raise InvalidRequest(f"capacity must be at least 1 token, got {capacity}")
        device = torch.device(device)
        if dir is not None and device.type != "cpu":
            raise InvalidRequest(f"a segment on {device.type} cannot be a mapped file; pass dir=None")
        segment_id = segment_id or uuid.uuid4().hex
        total, data_at, data_bytes = _sizes(layout, capacity, query_sample)
        path = None
        if dir is None:
            meta = np.zeros(data_at, np.uint8)
            data = torch.empty(data_bytes, dtype=torch.uint8, device=device)
        else:
            path = dir / f"{segment_id}.kv"
            base = _make_file(path, total)
            meta, data = base[:data_at].numpy(), base[data_at:]
        text = json.dumps(
            {"segment_id": segment_id, "capacity": capacity, "query_sample": query_sample, "layout": layout.to_dict()},
            sort_keys=True, separators=(",", ":"),
        ).encode()  # fmt: skip
        meta[_JSON_AT : _JSON_AT + len(text)] = np.frombuffer(text, np.uint8)
        words = meta[:_RANGES_AT].view(np.int64)
        words[:3] = [_MAGIC, FORMAT_VERSION, len(text)]
        words[3:4].view(np.uint64)[0] = xxhash.xxh3_64_intdigest(text)
        return cls(layout, capacity, segment_id, query_sample, meta, data, path)

    @classmethod
    def open(cls, dir: Path, location: str, *, expect: SegmentHandle | None = None, writable: bool = True) -> KVSegment:
        """Map a segment that another process (or this one) created.

        Args:
            dir: folder of segment files.
            location: bare file name, as in a SegmentHandle.
            expect: what the header must say: segment id, layout digest, capacity, sealed tokens and their checksum.
            writable: False maps copy-on-write, so that a reader cannot damage the owner's bytes.

        Raises:
            InvalidRequest: location is not a bare file name.
            LeaseLost: no such file: its owner has freed it.
            CorruptBlock: the header is damaged, of another format version, or not what `expect` says; or the file is short.
        """
        bare = location.endswith(".kv") and not location.startswith(".") and all(c.isalnum() or c in "-_." for c in location)
        if not bare:
            raise InvalidRequest("segment location must be a bare file name ending in .kv (letters, digits, '-', '_', '.')")
        path = dir / location
        try:
            fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            raise LeaseLost(f"segment {location}: its owner has freed it; ask for the prompt again") from None
        except OSError as error:
            raise CorruptBlock(f"segment {location}: cannot be opened ({error.strerror})") from None
        try:
            size = os.fstat(fd).st_size
            head = np.frombuffer(os.pread(fd, PAGE, 0), np.uint8)
        finally:
            os.close(fd)
        layout, capacity, segment_id, query_sample = _read_header(head, location)
        total, data_at, _ = _sizes(layout, capacity, query_sample)
        if size != total:
            raise CorruptBlock(f"segment {segment_id}: file has {size} bytes, its header says {total}")
        base = torch.from_file(str(path), shared=writable, size=total, dtype=torch.uint8)
        segment = cls(layout, capacity, segment_id, query_sample, base[:data_at].numpy(), base[data_at:], path)
        segment.check()
        if expect is not None:
            segment._compare(expect)
        return segment

    def _compare(self, expect: SegmentHandle) -> None:
        for name, ours, theirs in (
            ("segment_id", self.segment_id, expect.segment_id),
            ("kv_layout", self.layout.digest(), expect.kv_layout),
            ("capacity", self.capacity, expect.capacity),
        ):
            if ours != theirs:
                raise CorruptBlock(f"segment {self.segment_id}: {name} is {ours}, the handle says {theirs}")
        if self.n_tokens < expect.n_tokens:
            raise CorruptBlock(f"segment {self.segment_id}: {self.n_tokens} sealed tokens, the handle says {expect.n_tokens}")
        # An entry may have been extended since the handle was made; then the handle's checksum is an earlier one.
        if expect.checksum and expect.checksum not in [digest for _, digest in self._chain()]:
            raise CorruptBlock(f"segment {self.segment_id}: its checksum is not the handle's")

    def close(self) -> None:
        """Drop this object's views. The memory goes when the last tensor handed out by `k`, `v` … is gone."""
        self._kv = self._queries = self._raw = None
        self.key_tiles.clear()
        self._meta = self._meta[:PAGE].copy()  # counters stay readable
        self._words = self._meta[:_RANGES_AT].view(np.int64)
        self._ids = self._ids.copy()

    def unlink(self) -> None:
        """Remove the file, if there is one and it is still there. Mappings of it stay valid."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    # -- reading -----------------------------------------------------------------------------------------------------

    @property
    def n_tokens(self) -> int:
        """Sealed tokens."""
        return int(self._words[_N_TOKENS])

    @property
    def n_total(self) -> int:
        """Valid tokens, the unsealed tail included."""
        return int(self._words[_N_TOTAL])

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """Ids of the valid tokens, int32 [n_total], a view."""
        return self._ids[: self.n_total]

    @property
    def location(self) -> str:
        """File name for a handle; "" for plain tensors."""
        return self.path.name if self.path is not None else ""

    @property
    def kv(self) -> Tensor:
        """All of it: [L, 2, Hkv, capacity, D], index 0 of the second axis is K. A view."""
        if self._kv is None:
            raise LeaseLost(f"segment {self.segment_id} is closed")
        return self._kv

    def k(self, layer: int) -> Tensor:
        """Keys, post-RoPE: [Hkv, capacity, D], a view; rows from n_total on are undefined."""
        return self.kv[layer, 0]

    def v(self, layer: int) -> Tensor:
        """Values: [Hkv, capacity, D], a view; rows from n_total on are undefined."""
        return self.kv[layer, 1]

    def query_sample(self, layer: int) -> Tensor | None:
        """Sampled queries of a layer, post-RoPE: [Hq, S, D], a view to fill or read; None where none are kept."""
        return None if self._queries is None else self._queries[layer]

    # -- writing -----------------------------------------------------------------------------------------------------

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Copy k and v [Hkv, T, D] of tokens start .. start+T-1 into a layer. They count once `advance` was called.

        Raises:
            InvalidRequest: the tokens do not fit, or are sealed already.
        """
        end = start + k.shape[1]
        if not self.n_tokens <= start or end > self.capacity:
            raise InvalidRequest(
                f"segment {self.segment_id}: cannot write tokens {start}..{end} "
                f"(sealed {self.n_tokens}, capacity {self.capacity})"
            )
        kv = self.kv[layer]
        kv[0, :, start:end].copy_(k)
        kv[1, :, start:end].copy_(v)

    def advance(self, token_ids: Sequence[int] | NDArray[np.int32]) -> None:
        """Make the next len(token_ids) tokens valid: their K and V of every layer have been written.

        Raises:
            InvalidRequest: more tokens than fit.
        """
        n, extra = self.n_total, len(token_ids)
        if n + extra > self.capacity:
            raise InvalidRequest(f"segment {self.segment_id}: {n} + {extra} tokens exceed its capacity of {self.capacity}")
        self._ids[n : n + extra] = token_ids
        self._words[_N_TOTAL] = n + extra

    def truncate(self, n_tokens: int) -> None:
        """Forget valid tokens from n_tokens on, and their key tiles.

        Raises:
            InvalidRequest: some of them are sealed, or there are not that many.
        """
        if not self.n_tokens <= n_tokens <= self.n_total:
            raise InvalidRequest(
                f"segment {self.segment_id}: cannot cut to {n_tokens} tokens (sealed {self.n_tokens}, valid {self.n_total})"
            )
        self._words[_N_TOTAL] = n_tokens
        self.key_tiles.truncate(n_tokens)

    def copy_prefix_from(self, other: KVSegment, n_tokens: int) -> None:
        """Copy the first n_tokens (K, V, ids, key tiles) of a segment of the same layout; they become valid here, not sealed.

        Raises:
            InvalidRequest: this segment is not empty, or n_tokens exceeds what `other` holds or what fits here.
            CorruptBlock: the layouts differ.
        """
        if other.layout != self.layout:
            raise CorruptBlock(f"segment {other.segment_id}: layout {other.layout.digest()}, wanted {self.layout.digest()}")
        if self.n_total or n_tokens > min(other.n_total, self.capacity):
            raise InvalidRequest(
                f"segment {self.segment_id}: cannot take {n_tokens} tokens (it holds {self.n_total}, capacity {self.capacity}, "
                f"the source holds {other.n_total})"
            )
        self.kv[:, :, :, :n_tokens].copy_(other.kv[:, :, :, :n_tokens])
        self.key_tiles.copy_prefix_from(other.key_tiles, n_tokens)
        self.advance(other._ids[:n_tokens])

    # -- sealing and checking ----------------------------------------------------------------------------------------

    def seal(self) -> str:
        """Fix all valid tokens and return the checksum, hex xxh3-128. Only the owner seals. Sealing again after the tail
        grew hashes the new tokens only: the checksum of range i covers the checksum of range i-1.

        Raises:
            InvalidRequest: more than 32 sealed ranges.
        """
        chain, n = self._chain(), self.n_total
        if chain and chain[-1][0] == n:
            return chain[-1][1]
        if len(chain) == _MAX_RANGES:
            raise InvalidRequest(f"segment {self.segment_id}: sealed {_MAX_RANGES} times already; copy it into a new one")
        start, before = chain[-1] if chain else (0, "")
        digest = self._hash(start, n, before)
        at = _RANGES_AT + 24 * len(chain)
        self._meta[at : at + 8].view(np.int64)[0] = n
        self._meta[at + 8 : at + 24] = np.frombuffer(digest, np.uint8)
        self._words[_N_RANGES] = len(chain) + 1
        self._words[_N_TOKENS] = n
        return digest.hex()

    @property
    def is_sealed(self) -> bool:
        """Something has been sealed, if only an empty sequence."""
        return int(self._words[_N_RANGES]) > 0

    @property
    def checksum(self) -> str:
        """Of the sealed tokens, hex; "" before `seal`."""
        chain = self._chain()
        return chain[-1][1] if chain else ""

    def verify(self) -> None:
        """Hash the sealed bytes again.

        Raises:
            CorruptBlock: they are not the bytes that were sealed.
        """
        start, before = 0, ""
        for end, digest in self._chain():
            if self._hash(start, end, before).hex() != digest:
                raise CorruptBlock(f"segment {self.segment_id}: tokens {start}..{end} do not match their checksum")
            start, before = end, digest

    def _chain(self) -> list[tuple[int, str]]:
        """(end token, checksum) of each sealed range."""
        n = min(max(int(self._words[_N_RANGES]), 0), _MAX_RANGES)
        rows = self._meta[_RANGES_AT : _RANGES_AT + 24 * n].reshape(n, 24)
        return [(int(row[:8].view(np.int64)[0]), row[8:].tobytes().hex()) for row in rows]

    def _hash(self, start: int, end: int, before: str) -> bytes:
        h = xxhash.xxh3_128(f"{self.layout.digest()} {start} {end} {before}".encode())
        h.update(self._ids[start:end].data)
        # Bytes on a device are never mapped or damaged by others; reading them all back would cost more than it guards.
        if self.device.type == "cpu" and end > start:
            for piece in self.pieces(start, end):
                h.update(piece.data)
        return h.digest()

    def pieces(self, start: int, end: int) -> Iterator[NDArray[np.uint8]]:
        """Bytes of tokens start..end of each (layer, K or V, head), in file order; each piece is contiguous."""
        if self._raw is None:
            raise LeaseLost(f"segment {self.segment_id} is closed")
        row, stride = self.layout.row_bytes, self.layout.row_bytes * self.capacity
        slabs = self._raw[: self.layout.bytes_per_token * self.capacity].view(-1, stride)[:, start * row : end * row]
        if slabs.device.type == "cpu":
            yield from slabs.numpy()
        else:
            for slab in slabs:
                yield slab.cpu().numpy()

    def check(self) -> None:
        """Verify counters and header (not the bytes: `verify`). Called by tests after each step, and by `open`.

        Raises:
            CorruptBlock: an invariant is broken.
        """
        chain = self._chain()
        ends = [end for end, _ in chain]
        good = (
            0 <= self.n_tokens <= self.n_total <= self.capacity
            and int(self._words[_N_RANGES]) == len(chain)
            and ends == sorted(set(ends))
            and self.n_tokens == (ends[-1] if ends else 0)
        )
        if not good:
            raise CorruptBlock(
                f"segment {self.segment_id}: counters do not fit (sealed {self.n_tokens} at {ends}, valid {self.n_total}, "
                f"capacity {self.capacity})"
            )
        _read_header(self._meta[:PAGE], self.segment_id)

    # -- between hosts -----------------------------------------------------------------------------------------------

    def iter_chunks(self) -> Iterator[Chunk]:
        """The sealed bytes as a checksummed stream, see `transfer.py`."""
        from winnow.index.transfer import iter_chunks

        return iter_chunks(self)

    @classmethod
    def from_chunks(
        cls, chunks: Iterable[Chunk], *, expect: SegmentHandle | None = None, tail_tokens: int = 0, dir: Path | None = None,
        device: str | torch.device = "cpu",
    ) -> KVSegment:  # fmt: skip
        """Build a sealed copy from a stream, see `transfer.SegmentReceiver`."""
        from winnow.index.transfer import SegmentReceiver

        receiver = SegmentReceiver(expect=expect, tail_tokens=tail_tokens, dir=dir, device=device)
        for chunk in chunks:
            receiver.push(chunk)
        return receiver.finish()


def _sizes(layout: SegmentLayout, capacity: int, query_sample: tuple[int, int] | None) -> tuple[int, int, int]:
    """Bytes of the file, offset of its data, bytes of data and queries."""
    data_at = PAGE + _pages(4 * capacity)
    data = _pages(layout.bytes_per_token * capacity)
    if query_sample is not None:
        hq, s = query_sample
        data += _pages(layout.n_layers * hq * s * layout.head_size * DTYPE_BYTES[layout.dtype])
    return data_at + data, data_at, data


def segment_bytes(layout: SegmentLayout, capacity: int, query_sample: tuple[int, int] | None = None) -> int:
    """What a segment of this capacity counts against a budget."""
    return _sizes(layout, capacity, query_sample)[0]


def _make_file(path: Path, size_bytes: int) -> Tensor:
    """A new sparse file, readable by its user only, mapped as uint8 [size_bytes]."""
    space = os.statvfs(path.parent)
    free = space.f_bavail * space.f_frsize
    if size_bytes > free:
        raise Overloaded(f"KV segment: {size_bytes} bytes needed, {free} free in the segment folder; set kv.dir to a larger one")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size_bytes)
        # from_file closes its descriptor after mapping: thousands of segments would otherwise meet the limit on open files.
        return torch.from_file(str(path), shared=True, size=size_bytes, dtype=torch.uint8)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _read_header(head: NDArray[np.uint8], name: str) -> tuple[SegmentLayout, int, str, tuple[int, int] | None]:
    """Layout, capacity, segment id and query sample. Raises CorruptBlock."""
    if head.size < PAGE:
        raise CorruptBlock(f"segment {name}: shorter than its header")
    words = head[:_RANGES_AT].view(np.int64)
    if int(words[0]) != _MAGIC:
        raise CorruptBlock(f"segment {name}: not a KV segment")
    if int(words[1]) != FORMAT_VERSION:
        raise CorruptBlock(f"segment {name}: format version {int(words[1])}, this build reads {FORMAT_VERSION}")
    size = int(words[2])
    text = head[_JSON_AT : _JSON_AT + size].tobytes() if 0 < size <= PAGE - _JSON_AT else b""
    if not text or xxhash.xxh3_64_intdigest(text) != int(words[3:4].view(np.uint64)[0]):
        raise CorruptBlock(f"segment {name}: its header does not match its checksum")
    fields = json.loads(text)
    sample = fields["query_sample"]
    return (
        SegmentLayout(**fields["layout"]), int(fields["capacity"]), str(fields["segment_id"]),
        (int(sample[0]), int(sample[1])) if sample else None,
    )  # fmt: skip

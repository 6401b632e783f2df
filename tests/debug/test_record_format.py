# SPDX-License-Identifier: Apache-2.0
"""The record format: both languages agree, and whatever happens to a file, what comes before can be read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.debug.preload import shared
from kvmpy.debug.record import events, format, layouts  # noqa: A004 - the module's name
from kvmpy.debug.record.events import (
    Chunk,
    Close,
    Deadline,
    End,
    Enter,
    Event,
    FileCall,
    Ioctl,
    Kick,
    Lines,
    Lost,
    Map,
    Memory,
    Note,
    Object,
    Pages,
    Payload,
    Thread,
    Unmap,
    Write,
    pack_all,
    unpack,
)
from kvmpy.debug.record.format import (
    FileHeader,
    Frame,
    FrameReader,
    FrameType,
    RecordError,
    RecordVersionError,
    pack_frame,
)
from kvmpy.debug.record.model import Record
from kvmpy.debug.record.writer import RecordWriter
from kvmpy.lab import events as lab_events
from kvmpy.lab import records


@pytest.mark.parametrize("before", [None, 0o644])
def test_records_are_for_their_owner_alone(before: int | None, tmp_path: Path) -> None:
    """Guest memory in a record may hold keys: written, copied or sent out of the lab, the file is 0600."""
    paths = [tmp_path / name for name in ("written", "saved", "received")]
    if before is not None:
        for path in paths:
            path.touch(before)
    RecordWriter(paths[0]).close()
    Record.load(paths[0]).save(paths[1])
    sent: list[dict[str, object]] = []
    paths[1].rename(tmp_path / "inside")
    records.send(sent.append, tmp_path / "inside")
    for event in sent:
        piece = lab_events.parse(json.dumps({**event, "name": "received"}).encode())
        assert isinstance(piece, lab_events.Record)
        records.receive(tmp_path, piece, 0)
    Record.load(paths[2]).save(paths[1])
    assert [oct(path.stat().st_mode & 0o777) for path in paths] == ["0o600"] * 3


def test_a_device_keeps_its_mode(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o644)
    os.close(format.private(str(tmp_path / "pipe"), os.O_RDWR))
    assert (tmp_path / "pipe").stat().st_mode & 0o777 == 0o644


HEADER = Path(format.__file__).with_name("format.h")
RING = Path(shared.__file__).with_name("ring.h")

U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
CHUNKS = st.builds(
    Chunk, U64, st.binary(max_size=40), st.integers(1, 3), st.integers(0, 2), st.integers(0, 1)
)
IOCTLS = {
    "object": U32,
    "fd": st.integers(-1, 1 << 20),
    "request": U64,
    "arg": U64,
    "result": st.integers(-1, 1 << 40),
    "errno": U32,
    "end_order": U64,
    "end_ns": U64,
    "chunks": st.lists(CHUNKS, max_size=4).map(tuple),
}
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
KEYS = st.text("abc", min_size=1, max_size=5)
LINES = st.dictionaries(KEYS, st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=9))
PAGES = st.lists(st.sampled_from([bytes(4096), bytes(range(256)) * 16]), min_size=1, max_size=3).map(tuple)
PAYLOADS: st.SearchStrategy[Payload] = st.one_of(
    st.builds(Ioctl, **IOCTLS),
    st.builds(Enter, **IOCTLS),
    st.builds(Thread, U32, U32, U32, NAMES),
    st.builds(Object, U32, U32, st.integers(-1, 1 << 20), st.integers(1, 11), U64, NAMES),
    st.builds(Close, U32),
    st.builds(Map, U64, U64, U64, U32, U32),
    st.builds(Unmap, U64, U64),
    st.builds(Pages, st.integers(1, 1 << 20), PAGES),
    st.builds(Memory, U64, st.lists(U32, max_size=9).map(tuple), st.integers(0, 1)),
    st.builds(Write, U64, st.binary(max_size=30)),
    st.builds(Kick, U32, U32, U32, U32),
    st.builds(Deadline, U32, U64),
    st.builds(FileCall, U32, U32, U64, U64, U64, st.integers(-1, 5), U32),
    st.builds(Event, U32, U32, U64),
    st.builds(End, U64),
    st.builds(Lost, U64),
    st.builds(Lines, LINES),
    st.builds(Note, LINES),
)


def sample() -> bytes:
    """Return a record with a HOST frame, an object and three ioctls."""
    frame = Frame(0, b"")
    results: list[tuple[Frame, Payload]] = [
        (frame, Lines({"kvmpy": "9.9", "kernel": "7.2"})),
        (Frame(0, b"", 7, 7, 1, 1), Object(1, 0, 3, 1, 0, "kvm")),
    ]
    for number in range(3):
        chunk = Chunk(0x1000, bytes([number]) * 9)
        results.append(
            (Frame(0, b"", 7, 7, 10 + number, 5), Ioctl(1, 3, 0xAE00, 0x1000, number, chunks=(chunk,)))
        )
    return pack_all(results)


def test_c_and_python_agree(tmp_path: Path) -> None:
    """The compiler lays out what the generated headers declare as Python packs it."""
    sizes = {name: packing.size for name, packing in layouts.PACKINGS.items()}
    lines = []
    for name, members in layouts.OFFSETS.items():
        # C rounds the size up to the strictest alignment.
        size, align = sizes[name], 64 if "_Alignas(64)" in layouts.LAYOUTS[name] else 1
        lines.append(f'_Static_assert(sizeof(struct kvmpy_{name}) == {-(-size // align) * align}, "{name}");')
        lines += [
            f'_Static_assert(offsetof(struct kvmpy_{name}, {member}) == {offset}, "{name}.{member}");'
            for member, offset in members.items()
        ]
    lines += [f'_Static_assert(KVMPY_REC_{kind.name} == {kind.value}, "{kind.name}");' for kind in FrameType]
    lines.append(f'_Static_assert(KVMPY_REC_FRAME_MAGIC == {format.FRAME_MAGIC}, "magic");')
    source = tmp_path / "check.c"
    source.write_text(
        f'#include <stddef.h>\n#include "{HEADER}"\n#include "{RING}"\n' + "\n".join(lines) + "\n"
    )
    done = subprocess.run(
        ["gcc", "-fsyntax-only", "-Wall", "-Werror", str(source)], capture_output=True, text=True,
        check=False, timeout=60,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.returncode == 0


def test_document_has_every_frame() -> None:
    """docs/record.md describes every frame type by its number and name."""
    text = (Path(__file__).parents[2] / "docs" / "record.md").read_text()
    for kind in FrameType:
        assert re.search(rf"\b{kind.value} {kind.name}\b", text), kind


@given(st.lists(st.tuples(PAYLOADS, U32, U64), max_size=6))
def test_round_trip(made: list[tuple[Payload, int, int]]) -> None:
    """What is written is what is read."""
    data = pack_all([(Frame(0, b"", tid, 1, order, 2), payload) for payload, tid, order in made])
    reader = FrameReader(data)
    matches = [(unpack(frame), frame.tid, frame.order) for frame in reader]
    assert reader.problem is None
    assert [(p, t, o) for p, t, o in matches] == [
        (_plain(payload), tid, order) for payload, tid, order in made
    ]


def _plain(payload: Payload) -> Payload:
    # Lines lose what a line cannot hold.
    if isinstance(payload, Lines):
        return type(payload)(format.parse_lines(format.format_lines(payload.values)))
    return payload


@given(st.integers(0, len(sample()) - 1))
def test_truncated(size: int) -> None:
    """A record cut anywhere is read up to its last whole frame."""
    data = sample()[:size]
    whole = [frame.offset for frame in FrameReader(sample())]
    if size < 32:
        with pytest.raises(RecordError):
            FrameReader(data)
        return
    reader = FrameReader(data)
    frames = list(reader)
    ends = [*whole[1:], len(sample())]
    # What is missing of a frame may be nothing but its padding.
    assert len(frames) >= sum(1 for end in ends if end <= size)
    assert len(frames) <= sum(1 for end in ends if end - 7 <= size)
    assert (reader.problem is None) == (size == 32 or not data[reader.end :].strip(b"\0"))


@given(st.integers(0, len(sample()) * 8 - 1))
def test_flipped_bit(bit: int) -> None:
    """A flipped bit is noticed, unless it is in the padding, and costs no frame before it."""
    data = bytearray(sample())
    data[bit // 8] ^= 1 << bit % 8
    if bit // 8 < 32:
        with pytest.raises(RecordError):
            FrameReader(bytes(data)).check()
        return
    true = list(FrameReader(sample()))
    reader = FrameReader(bytes(data))
    frames = list(reader)
    before = [frame for frame in true if frame.offset + 40 + len(frame.payload) <= bit // 8]
    assert frames[: len(before)] == before
    assert frames == true or reader.problem is not None
    resynced = list(FrameReader(bytes(data), resync=True))
    assert len(resynced) >= len(true) - 1


@given(st.binary(max_size=300))
def test_anything(data: bytes) -> None:
    """Bytes of any kind end in an error or in a record, and in nothing else."""
    for start in (data, FileHeader().pack() + data, sample() + data):
        try:
            record = Record.from_bytes(start)
        except RecordError:
            continue
        record.describe()


@given(st.sampled_from(list(FrameType)), st.binary(max_size=80))
def test_payload_that_makes_no_sense(kind: FrameType, payload: bytes) -> None:
    """A frame with a right checksum and a wrong content is a problem of the record, at most."""
    data = FileHeader().pack() + pack_frame(kind, payload, 1, 1, 1, 1)
    record = Record.from_bytes(data)
    record.describe()


def test_newer_version() -> None:
    """A record of a newer major version is refused, with what it says about its origin."""
    header = FileHeader(major=2, minor=5).pack()
    with pytest.raises(
        RecordVersionError, match=r"2\.5 \(written by kvmpy 9\.9\), this kvmpy reads 1\.x"
    ) as info:
        Record.from_bytes(header + sample()[32:])
    assert info.value.host["kernel"] == "7.2"


def test_newer_minor_version() -> None:
    """A newer minor version is read; frames of unknown types and bytes behind a payload are passed over."""
    header = FileHeader(minor=9).pack()
    more = pack_frame(999, b"what?", 1, 1, 1, 1) + pack_frame(FrameType.CLOSE, bytes(8) + b"more", 1, 1, 1, 1)
    record = Record.from_bytes(header + sample()[32:] + more)
    assert not record.problems
    assert len(record.ioctls) == 3


@pytest.mark.parametrize(
    ("field", "value", "says"), [("arch", 183, "ELF machine 183"), ("page_size", 65536, "65536")]
)
def test_other_machine(field: str, value: int, says: str) -> None:
    """A record of another architecture or page size is refused by name."""
    header = FileHeader(**{field: value}).pack()
    with pytest.raises(RecordVersionError, match=says):
        Record.from_bytes(header + sample()[32:])


def test_zeroes_are_the_end() -> None:
    """A file that was grown in advance ends where the zeroes begin."""
    reader = FrameReader(sample() + bytes(5000))
    assert len(list(reader)) == 5
    assert reader.problem is None


def test_no_record() -> None:
    """A file that is none says so."""
    with pytest.raises(RecordError, match="not a record"):
        FrameReader(b"\x7fELF" + bytes(60))


def test_bomb() -> None:
    """Pages that decompress to more than they should are refused without being unpacked."""
    body = zlib.compress(bytes(1 << 20))
    payload = events.PAGES.pack(1, 1, format.CODEC_ZLIB, len(body)) + body
    record = Record.from_bytes(FileHeader().pack() + pack_frame(FrameType.PAGES, payload, 1, 1, 1, 1))
    assert not record.problems or "bytes" in record.problems[0].text
    assert all(len(page) == 4096 for page in record.pages.values())

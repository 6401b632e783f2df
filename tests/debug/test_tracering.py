# SPDX-License-Identifier: Apache-2.0
"""The trace ring buffer, taken apart without a kernel."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.debug.watch.tracering import EventFormat, FormatError, PageLayout
from tests.debug import fake_tracefs as fake

LAYOUT = PageLayout.parse(fake.HEADER_PAGE, fake.HEADER_EVENT)


def test_layout() -> None:
    """Sizes and type numbers are what the kernel's two files say."""
    assert (LAYOUT.size, LAYOUT.type_bits, LAYOUT.delta_bits) == (4096, 5, 27)
    assert (LAYOUT.padding, LAYOUT.time_extend, LAYOUT.time_stamp, LAYOUT.longest) == (29, 30, 31, 28)


def test_other_page_size() -> None:
    """Sub-buffers may be larger than a page."""
    larger = fake.HEADER_PAGE.replace("size:4080", "size:16368")
    assert PageLayout.parse(larger, fake.HEADER_EVENT).size == 16384


@pytest.mark.parametrize("missing", ["timestamp", "commit", "data"])
def test_layout_without_a_field(missing: str) -> None:
    """A description that lacks a part names it."""
    with pytest.raises(FormatError, match=missing):
        PageLayout.parse(fake.HEADER_PAGE.replace(f" {missing};", " renamed;"), fake.HEADER_EVENT)


def test_layout_with_other_words() -> None:
    """Records that do not begin with a 32-bit word are refused, not misread."""
    with pytest.raises(FormatError, match="32-bit"):
        PageLayout.parse(fake.HEADER_PAGE, fake.HEADER_EVENT.replace("27 bits", "59 bits"))


def test_short_and_long_records() -> None:
    """Both forms of a length give the payload, in time."""
    page = fake.page(1000, fake.short(5, b"abcdefgh"), fake.long(7, b"x" * 200), fake.short(0, b"wxyz"))
    assert LAYOUT.read(page).records == [(1005, b"abcdefgh"), (1012, b"x" * 200), (1012, b"wxyz")]


def test_times_beyond_27_bits() -> None:
    """Time extends add, absolute stamps replace the low 59 bits."""
    base = 1 << 61
    ring_page = fake.page(
        base,
        fake.extend((1 << 30) + 3),
        fake.short(1, b"aaaa"),
        fake.absolute(base + (1 << 40) + 9),
        fake.short(2, b"bbbb"),
    )
    assert LAYOUT.read(ring_page).records == [
        (base + (1 << 30) + 4, b"aaaa"),
        (base + (1 << 40) + 11, b"bbbb"),
    ]


def test_discarded_records() -> None:
    """What was taken back is passed over, its time counts; the rest of a page behind padding is nothing."""
    page = fake.page(
        50, fake.discarded(3, 24), fake.short(4, b"real"), fake.head(29, 0), fake.short(1, b"gone")
    )
    assert LAYOUT.read(page).records == [(57, b"real")]


@pytest.mark.parametrize(("lost", "number", "expected"), [(None, False, 0), (17, True, 17), (1, False, -1)])
def test_lost_records(lost: int | None, number: bool, expected: int) -> None:
    """How many records were lost before the page, or that some were."""
    page = LAYOUT.read(fake.page(0, fake.short(1, b"kept"), lost=lost, lost_number=number))
    assert (page.records, page.lost) == ([(1, b"kept")], expected)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(fake.head(20, 1) + b"shor", id="ends-outside"),
        pytest.param(fake.head(0, 1) + struct.pack("<I", 2), id="shorter-than-its-length"),
    ],
)
def test_records_that_contradict_their_page(data: bytes) -> None:
    """A record that reaches out of its page is an error, not garbage."""
    with pytest.raises(FormatError, match="record"):
        LAYOUT.read(fake.page(0, data))


def test_page_longer_than_itself() -> None:
    """A page that claims more than was read is an error."""
    with pytest.raises(FormatError, match="claims"):
        LAYOUT.read(struct.pack("<QQ", 0, 5000).ljust(4096, b"\0"))


@given(
    st.integers(0, 1 << 50),
    st.lists(
        st.tuples(
            st.integers(0, 1 << 40), st.binary(min_size=4, max_size=160).filter(lambda b: len(b) % 4 == 0)
        ),
        max_size=18,
    ),
)
def test_what_was_encoded(start: int, wanted: list[tuple[int, bytes]]) -> None:
    """Any mixture of records comes back with its times."""
    now, expected, records = start, [], []
    for delta, payload in wanted:
        now += delta
        expected.append((now, payload))
        if delta >= 1 << 27:
            records.append(fake.extend(delta))
            delta = 0
        records.append(fake.short(delta, payload) if len(payload) <= 112 else fake.long(delta, payload))
    assert LAYOUT.read(fake.page(start, *records)).records == expected


def test_format_file() -> None:
    """Names, offsets, sizes and signs of fields; arrays are bytes."""
    text = fake.format_text(
        "sample",
        9,
        "\tfield:char comm[8];\toffset:8;\tsize:8;\tsigned:0;\n"
        "\tfield:s16 x;\toffset:16;\tsize:2;\tsigned:1;\n",
    )
    event_format = EventFormat.parse(text)
    payload = struct.pack("<HBBi8sh", 9, 0, 0, 77, b"thread\0\0", -5)
    assert (
        event_format.name,
        event_format.id,
        event_format.number(payload, "common_pid"),
        event_format.number(payload, "x"),
    ) == (
        "sample",
        9,
        77,
        -5,
    )
    assert event_format.fields["comm"].value(payload) == b"thread\0\0"
    assert event_format.number(payload, "absent", 3) == 3
    with pytest.raises(FormatError, match="array"):
        event_format.number(payload, "comm")
    with pytest.raises(FormatError, match="comm"):
        event_format.fields["comm"].value(payload[:12])


@pytest.mark.parametrize("text", ["", "name: x\nformat:\n", "ID: 5\n", "name: x\nID: 3\nformat:\n"])
def test_not_a_format_file(text: str) -> None:
    """What describes no event is refused."""
    with pytest.raises(FormatError):
        EventFormat.parse(text)


def test_fields_that_are_needed() -> None:
    """An event of another kernel that lacks a field says which, and what it has."""
    parsed = EventFormat.parse(fake.format_text("kvm_page_fault", *fake.FORMATS["kvm_page_fault"]))
    parsed.need("guest_rip", "error_code")
    with pytest.raises(FormatError, match=r"no field gpa, level.*fault_address"):
        parsed.need("gpa", "level", "vcpu_id")

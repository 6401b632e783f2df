# SPDX-License-Identifier: Apache-2.0
"""The C types of guest globals, as gcc's debug information has them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvmpy.guest import GuestProgram
from kvmpy.guest.ctype import CType
from kvmpy.guest.errors import GuestSymbolError, GuestTypeError

SOURCE = """
#include <kvmpy/guest.h>

typedef struct { u16 low; u16 high; } pair_t;
enum color { RED, GREEN = 7 };

struct all {
	u8 byte;
	s32 number;
	const volatile u64 word;
	char text[8];
	pair_t pairs[2][3];
	union { u32 whole; u8 parts[4]; };
	struct { u8 deep; } inner;
	u32 three : 3, seven : 7;
	u64 : 0;
	u64 far : 40;
	enum color color;
	void *pointer;
	_Bool flag;
};

extern struct all declared;
struct all declared GUEST_SHARED;
s16 numbers[4];
static volatile u32 hidden;

void guest_main(void)
{
	declared.byte = numbers[0] + hidden++;
}
"""


@pytest.fixture(scope="module")
def program() -> GuestProgram:
    """The program with :data:`SOURCE`; skipped without a compiler."""
    return GuestProgram.from_c(SOURCE)


@pytest.fixture
def everything(program: GuestProgram) -> CType:
    """The struct with a field of every kind."""
    return program.type_of("declared")


def test_zero_is_what_is_not_given(everything: CType) -> None:
    """A struct without values is zeros, over all its size."""
    assert everything.encode({}) == bytes(everything.size)
    assert everything.name == "struct all"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("byte", 0xFE),
        ("number", -5),
        ("word", 0x1122334455667788),
        ("text", b"guest\0\0\0"),
        ("whole", 0x04030201),
        ("inner", SimpleNamespace(deep=9)),
        ("three", 5),
        ("seven", 0x55),
        ("far", 0xAB_CDEF_0123),
        ("color", 7),
        ("pointer", 1 << 63),
        ("flag", 1),
    ],
)
def test_a_field_alone(everything: CType, name: str, value: object) -> None:
    """What is written to one field is read from it, and every other field stays 0."""
    given = vars(value) if isinstance(value, SimpleNamespace) else value
    decoded = everything.decode(everything.encode({name: given}))
    assert getattr(decoded, name) == value
    others = {"whole": "parts", "parts": "whole"}
    for member in everything.members:
        if member.name not in (name, others.get(name)):
            assert getattr(decoded, member.name) == getattr(
                everything.decode(bytes(everything.size)), member.name
            )


def test_fields_lie_where_gcc_put_them(everything: CType) -> None:
    """Offsets and byte order are those of the compiled struct."""
    data = everything.encode({"byte": 1, "number": -2, "text": b"ab", "pairs": [[], [{"high": 0x1234}]]})
    assert data[0] == 1
    assert data[4:8] == b"\xfe\xff\xff\xff"
    assert data[16:24] == b"ab" + bytes(6)
    # pairs[1][0].high: behind three pairs of 4 bytes.
    assert data[24 + 12 + 2 : 24 + 12 + 4] == b"\x34\x12"
    assert sum(data) == 1 + sum(b"\xfe\xff\xff\xff") + sum(b"ab") + 0x12 + 0x34


def test_bits_beside_each_other(everything: CType) -> None:
    """Bit-fields of one word do not touch each other."""
    decoded = everything.decode(everything.encode({"three": 7, "seven": 0, "far": (1 << 40) - 1}))
    assert (decoded.three, decoded.seven, decoded.far) == (7, 0, (1 << 40) - 1)
    decoded = everything.decode(everything.encode({"seven": 127}))
    assert (decoded.three, decoded.seven) == (0, 127)


def test_arrays(program: GuestProgram) -> None:
    """An array is a list, filled from its start."""
    numbers = program.type_of("numbers")
    assert numbers.encode([-1, 2]) == b"\xff\xff\x02\x00" + bytes(4)
    assert numbers.decode(numbers.encode([-1, 2, -3, 4])) == [-1, 2, -3, 4]


def test_a_static_variable(program: GuestProgram) -> None:
    """A variable that only one file sees has its type, too."""
    hidden = program.type_of("hidden")
    assert (hidden.size, hidden.signed) == (4, False)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"bite": 1}, "struct all has no field 'bite'; did you mean byte"),
        ({"byte": 256}, "256 does not fit into u8"),
        ({"number": 1 << 31}, "does not fit"),
        ({"number": "x"}, "does not fit"),
        ({"three": 8}, "does not fit into the 3 bits of three"),
        ({"three": -1}, "does not fit"),
        ({"text": b"123456789"}, "room for 8 elements, not 9"),
        ({"text": "text"}, "takes a sequence"),
        ({"pairs": [[{}] * 4]}, "room for 3"),
        ({"inner": 3}, "takes its fields by name"),
    ],
)
def test_what_does_not_fit(everything: CType, fields: dict[str, object], match: str) -> None:
    """An unknown field and a value that does not fit are named."""
    with pytest.raises(GuestTypeError, match=match):
        everything.encode(fields)


def test_variables_without_a_type(program: GuestProgram) -> None:
    """A name that is not there, a function, and an image without debug information are errors."""
    with pytest.raises(GuestSymbolError, match="closest: declared"):
        program.type_of("declard")
    with pytest.raises(GuestTypeError, match="no debug information of guest_main"):
        program.type_of("guest_main")
    bare = GuestProgram.from_c(SOURCE, cflags=["-g0"])
    with pytest.raises(GuestTypeError, match="no debug information of declared"):
        bare.type_of("declared")

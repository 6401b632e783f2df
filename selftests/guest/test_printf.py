# SPDX-License-Identifier: Apache-2.0
"""The guest's printf formats as C does."""

from __future__ import annotations

from kvmpy import GuestProgram, MakeVm

BIG = 0xFEDCBA9876543210

# Format, the argument in C, and what C prints.
NUMBERS = [
    ("%d", "0", "0"),
    ("%d", "-2147483648", "-2147483648"),
    ("%i", "2147483647", "2147483647"),
    ("%u", "4294967295u", "4294967295"),
    ("%x", "0xdeadbeefu", "deadbeef"),
    ("%X", "0xdeadbeefu", "DEADBEEF"),
    ("%#x", "0x1fu", "0x1f"),
    ("%#x", "0u", "0"),
    ("%o", "8u", "10"),
    ("%#o", "8u", "010"),
    ("%lo", "~0ul", "1777777777777777777777"),
    ("%ld", "-9223372036854775807l - 1", "-9223372036854775808"),
    ("%lu", "18446744073709551615ul", "18446744073709551615"),
    ("%lx", f"{BIG:#x}ul", f"{BIG:x}"),
    ("%llx", f"{BIG:#x}ull", f"{BIG:x}"),
    ("%lld", "-5ll", "-5"),
    ("%zu", "sizeof(u64)", "8"),
    ("%hhx", "0x1234", "34"),
    ("%hx", "0x12345", "2345"),
    ("%hd", "-1", "-1"),
    ("%p", "(void *)0x1000", "0x1000"),
    ("%5d|", "42", "   42|"),
    ("%-5d|", "42", "42   |"),
    ("%05d", "-42", "-0042"),
    ("%+d", "42", "+42"),
    ("% d", "42", " 42"),
    ("%08x", "0xabcu", "00000abc"),
    ("%#010x", "0xabcu", "0x00000abc"),
    ("%.5d", "42", "00042"),
    ("%8.3d|", "7", "     007|"),
    ("%08.3d|", "7", "     007|"),
    ("%.0d|", "0", "|"),
    ("%.20d|", "-7", "-00000000000000000007|"),
    ("%016llx", "0x123ull", "0000000000000123"),
    ("%c", "'Z'", "Z"),
    ("%-3c|", "'Z'", "Z  |"),
    ("%s", '"text"', "text"),
    ("%7s|", '"text"', "   text|"),
    ("%-7s|", '"text"', "text   |"),
    ("%.2s", '"text"', "te"),
    ("%s", "(char *)NULL", "(null)"),
    ("100%% of %d", "1", "100% of 1"),
]


def test_formats(make_vm: MakeVm) -> None:
    """Every conversion, flag, width, precision and length of the guest's printf prints what C prints."""
    lines = "".join(f'\tGUEST_PRINTF("{form}\\n", {value});\n' for form, value, _ in NUMBERS)
    source = f"#include <kvmpy/guest.h>\n\nvoid guest_main(void)\n{{\n{lines}}}\n"
    vm = make_vm.run(GuestProgram.from_c(source, cflags=["-Wno-format"]))
    printed = vm.console.splitlines()
    assert dict(zip(NUMBERS, printed, strict=True)) == {entry: entry[2] for entry in NUMBERS}


SEVERAL = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	GUEST_PRINTF("%*d|%-*d|%.*s|%*d\\n", 5, 42, 5, 42, 2, "text", -4, 7);
	GUEST_PRINTF("%d %s %llx %c %u %d %d %d %d\\n", 1, "two", 3ull, '4', 5u, 6, 7, 8, 9);
	GUEST_PRINTF("%q and the end %");
}
"""


def test_arguments_in_a_row(make_vm: MakeVm) -> None:
    """Widths come from arguments, many arguments keep their order, unknown conversions are shown."""
    vm = make_vm.run(GuestProgram.from_c(SEVERAL, cflags=["-Wno-format"]))
    assert vm.console == "   42|42   |te|7   \n1 two 3 4 5 6 7 8 9\n%q and the end "


LONG = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	GUEST_PRINTF("%01000d|", 7);
	GUEST_PRINTF("%s", "");
	GUEST_PRINTF("end");
}
"""


def test_long_text(make_vm: MakeVm) -> None:
    """Text longer than a ucall slot arrives in one piece on the console."""
    vm = make_vm.run(LONG)
    assert vm.console == "7|end".rjust(1004, "0")


TO_A_BUFFER = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	char buf[8];

	memset(buf, '#', sizeof(buf));
	GUEST_ASSERT_EQ(snprintf(buf, 5, "%d", 123456), 6);
	GUEST_ASSERT_EQ(strcmp(buf, "1234"), 0);
	GUEST_ASSERT_EQ(buf[5], '#');

	GUEST_ASSERT_EQ(snprintf(buf, sizeof(buf), "%s", "1234567"), 7);
	GUEST_ASSERT_EQ(strcmp(buf, "1234567"), 0);

	buf[0] = '#';
	GUEST_ASSERT_EQ(snprintf(buf, 0, "%d", 5), 1);
	GUEST_ASSERT_EQ(buf[0], '#');
	GUEST_ASSERT_EQ(snprintf(buf, 1, "%d", 5), 1);
	GUEST_ASSERT_EQ(buf[0], '\\0');
}
"""


def test_to_a_buffer(make_vm: MakeVm) -> None:
    """snprintf never writes past its buffer, ends it with NUL, and returns the length of the whole text."""
    vm = make_vm.run(TO_A_BUFFER)
    assert vm.vcpus[0].done

# SPDX-License-Identifier: Apache-2.0
"""Guest programs are compiled once per content, and what goes wrong points into the test's own file."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

from kvmpy.guest import (
    GuestBuildError,
    GuestBuildWarning,
    GuestProgram,
    GuestSymbolError,
    layout,
    program,
    toolchain,
)

HERE = str(Path(__file__).absolute())

COUNTER = """
#include <kvmpy/guest.h>
u64 counter = 5;
u32 table[16];
u64 visible GUEST_SHARED;
static u64 GUEST_USER in_user(u64 x) { return x; }
static u8 user_stack[64] GUEST_USER_DATA;

void guest_main(void)
{
	GUEST_SYNC(counter++);
	GUEST_SYNC(visible, table);
	guest_user_run(in_user, 1, user_stack + sizeof(user_stack));
}
"""

BROKEN = """
#include <kvmpy/guest.h>
void guest_main(void)
{
	GUEST_SYNC(no_such_variable);
}
"""

UNDEFINED = """
extern void elsewhere(void);
void guest_main(void)
{
	elsewhere();
}
"""

ASSEMBLY = """
	.text
	.globl guest_main
	.type guest_main, @function
guest_main:
	movl $5, %eax
	ret
	.size guest_main, . - guest_main
"""


def _line_here(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


@pytest.fixture(scope="module")
def counter() -> GuestProgram:
    return GuestProgram.from_c(COUNTER)


def test_the_entry_is_the_runtime_s(counter: GuestProgram) -> None:
    assert counter.entry == counter.address_of("_start")
    assert counter.function(counter.entry) == ("_start", 0)


def test_segments_are_pages_of_one_kind(counter: GuestProgram) -> None:
    def kind_of(name: str) -> str:
        gva = int(counter.address_of(name))
        segment = next(s for s in counter.segments if int(s.gva) <= gva < int(s.gva) + s.memsize)
        assert segment.gva.is_aligned()
        flags = (segment.readable, "r"), (segment.writable, "w"), (segment.executable, "x")
        return (
            "".join(letter for on, letter in flags if on)
            + " shared" * segment.shared
            + " user" * segment.user
        )

    assert kind_of("guest_main") == "rx"
    assert kind_of("counter") == "rw"
    assert kind_of("table") == "rw"
    assert kind_of("visible") == "rw shared"
    assert kind_of("in_user") == "rx user"
    assert kind_of("user_stack") == "rw user"


def test_the_image_begins_where_the_layout_says(counter: GuestProgram) -> None:
    assert int(counter.segments[0].gva) == layout.IMAGE_BASE


def test_initial_values_are_in_the_segment(counter: GuestProgram) -> None:
    gva = counter.address_of("counter")
    segment = next(s for s in counter.segments if int(s.gva) <= int(gva) < int(s.gva) + s.memsize)
    offset = gva - segment.gva
    assert bytes(segment.data[offset : offset + 8]) == (5).to_bytes(8, "little")


def test_symbols_have_size_and_type(counter: GuestProgram) -> None:
    assert (counter.symbol("table").size, counter.symbol("table").type) == (64, "object")
    assert counter.symbol("guest_main").type == "function"
    assert counter.symbols["counter"].gva == counter.address_of("counter")


def test_vector_stubs_have_a_fixed_stride(counter: GuestProgram) -> None:
    stubs = counter.symbol(layout.VECTORS_SYMBOL)
    assert 255 * layout.VECTOR_STRIDE < stubs.size <= 256 * layout.VECTOR_STRIDE
    base = counter.segments[0].gva
    code = bytes(counter.segments[0].data)
    for vector in range(256):
        address = stubs.gva - base + vector * layout.VECTOR_STRIDE
        # push $0 (where the CPU pushes no error code), push $vector
        head = b"" if vector in (8, 10, 11, 12, 13, 14, 17, 21, 29, 30) else b"\x6a\x00"
        number = bytes([0x6A, vector]) if vector < 128 else b"\x68" + vector.to_bytes(4, "little")
        assert code[address:].startswith(head + number), vector


def test_an_unknown_symbol_names_the_closest(counter: GuestProgram) -> None:
    with pytest.raises(GuestSymbolError, match="closest: counter") as caught:
        counter.symbol("countr")
    assert caught.value.closest[0] == "counter"
    with pytest.raises(GuestSymbolError, match=r"no symbol 'zzzzzzzz'$"):
        counter.address_of("zzzzzzzz")


def test_lines_point_into_this_file(counter: GuestProgram) -> None:
    start = counter.symbol("guest_main")
    lines = {counter.line(start.gva + offset) for offset in range(start.size)}
    assert (HERE, _line_here("GUEST_SYNC(counter++);")) in lines
    assert {file for file, _ in filter(None, lines)} <= {HERE} | {
        f"guest_asm/include/kvmpy/{name}.h" for name in ("ucall", "cpu")
    }


def test_addresses_outside_the_program_have_no_line_and_no_function(counter: GuestProgram) -> None:
    for gva in (0, 0x1000, 0x7FFF_FFFF_F000):
        assert counter.line(gva) is None
        assert counter.function(gva) is None
    assert counter.function(int(counter.address_of("counter"))) is None


def test_a_compile_error_points_at_the_line_of_the_literal() -> None:
    with pytest.raises(GuestBuildError) as caught:
        GuestProgram.from_c(BROKEN)
    line = _line_here("GUEST_SYNC(no_such_variable);")
    assert f"{HERE}:{line}:" in caught.value.stderr
    assert "'no_such_variable' undeclared" in str(caught.value)
    assert "gcc" in caught.value.command


def test_an_error_in_a_computed_source_shows_its_lines() -> None:
    with pytest.raises(GuestBuildError) as caught:
        GuestProgram.from_c(BROKEN.replace("no_such_variable", "computed_variable"))
    assert re.search(rf"^{re.escape(HERE)}:\d+:5:", caught.value.stderr, re.MULTILINE)
    assert "\n>    5 | \tGUEST_SYNC(computed_variable);\n" in caught.value.stderr


def test_a_missing_symbol_is_a_link_error() -> None:
    with pytest.raises(GuestBuildError, match="undefined reference to `elsewhere'") as caught:
        GuestProgram.from_c(UNDEFINED)
    assert f"{HERE}:{_line_here('elsewhere' + '();')}:" in caught.value.stderr


def test_an_image_too_large_is_refused_by_the_linker() -> None:
    with pytest.raises(GuestBuildError, match="the image runs into the descriptor tables"):
        GuestProgram.from_c("char big[0x8000000];\nvoid guest_main(void) { big[0] = 1; }\n")


def test_the_same_content_is_the_same_object(counter: GuestProgram) -> None:
    assert GuestProgram.from_c(COUNTER) is counter
    assert GuestProgram.from_c(COUNTER, cflags=["-DOTHER"]) is not counter


def test_flags_reach_the_compiler() -> None:
    sized = "char sized[SIZE];\nvoid guest_main(void) { }\n"
    assert GuestProgram.from_c(sized, cflags=["-DSIZE=7"]).symbol("sized").size == 7
    assert GuestProgram.from_c(sized, cflags=["-DSIZE=9"]).symbol("sized").size == 9


def test_a_warning_comes_each_time_the_program_is_asked_for(fresh_cache: Path) -> None:
    noisy = "void guest_main(void)\n{\n\tint unused;\n}\n"
    with pytest.warns(GuestBuildWarning, match="unused variable 'unused'") as caught:
        GuestProgram.from_c(noisy)
    assert caught[0].filename == HERE
    with pytest.warns(GuestBuildWarning, match="unused variable 'unused'"):
        GuestProgram.from_c(noisy)
    program._known.clear()
    with pytest.warns(GuestBuildWarning, match="unused variable 'unused'"):
        GuestProgram.from_c(noisy)


@pytest.mark.parametrize("bits", [64, 32])
def test_the_runtime_and_its_headers_compile_without_warnings(tmp_path: Path, bits: int) -> None:
    source = tmp_path / "all.c"
    source.write_text("#include <kvmpy/guest.h>\nvoid guest_main(void) { }\n")
    flags = ["-Wextra", "-Werror", "-Wundef", "-Wshadow"]
    sources = [*toolchain.runtime_sources(bits), source]
    objects, _, said = toolchain.compile_objects(
        toolchain.find(), sources, tmp_path, cflags=flags, name="all", bits=bits
    )
    assert said == ""
    assert len(objects) == len(sources)


def test_a_ucall_with_one_value_takes_five_instructions() -> None:
    from kvmpy.guest.disasm import disassemble

    guest_program = GuestProgram.from_c(
        "#include <kvmpy/guest.h>\nvoid one(u64 value) { GUEST_SYNC(value); }\nvoid guest_main(void) { }\n"
    )
    one, text = guest_program.symbol("one"), guest_program.segments[0]
    place = one.gva - text.gva
    code = [
        line.split()[0] for _, line in disassemble(bytes(text.data[place : place + one.size]), int(one.gva))
    ]
    assert code == ["mov", "mov", "mov", "mov", "out", "ret"]


def test_a_32_bit_program_lays_structures_out_as_the_host_knows_them() -> None:
    source = "#include <kvmpy/guest.h>\nstruct { u8 a; u64 b; } pair;\nvoid guest_main(void) { }\n"
    small = GuestProgram.from_c(source, cflags=["-m32"])
    assert (small.bits, GuestProgram.from_c(source).bits) == (32, 64)
    assert small.symbol("pair").size == 16
    assert small.symbol("guest_vectors").size > 255 * 16


def test_assembly() -> None:
    program = GuestProgram.from_asm(ASSEMBLY)
    start = program.symbol("guest_main")
    assert (start.size, start.type) == (6, "function")
    assert program.line(start.gva) == (HERE, _line_here("movl $5, %eax"))
    assert program.entry == program.address_of("_start")


def test_an_error_in_assembly_points_at_its_line() -> None:
    with pytest.raises(GuestBuildError) as caught:
        GuestProgram.from_asm(
            """
	.text
	nosuchinstruction %rax
"""
        )
    assert f"{HERE}:{_line_here('nosuchinstruction' + ' %rax')}: Error:" in caught.value.stderr


def test_assembly_may_bring_its_own_entry() -> None:
    program = GuestProgram.from_asm("\t.globl _start\n_start:\n\thlt\n")
    assert int(program.entry) == layout.IMAGE_BASE
    assert "guest_main" not in program.symbols


def test_files(tmp_path: Path) -> None:
    main, helper, asm = tmp_path / "main.c", tmp_path / "helper.c", tmp_path / "low.S"
    main.write_text('#include "shared.h"\nvoid guest_main(void)\n{\n\thelper(VALUE);\n\tlow();\n}\n')
    (tmp_path / "shared.h").write_text("#define VALUE 3\nvoid helper(int);\nvoid low(void);\n")
    helper.write_text('#include "shared.h"\nint got;\nvoid helper(int x)\n{\n\tgot = x;\n}\n')
    asm.write_text(".globl low\nlow:\n\tret\n")
    program = GuestProgram.from_file(main, helper, asm)
    assert program.name == "main.c"
    assert program.line(program.address_of("helper")) == (str(helper), 5)
    assert GuestProgram.from_file(main, helper, asm) is program


def test_a_changed_file_or_header_makes_a_new_program(tmp_path: Path) -> None:
    main, header = tmp_path / "main.c", tmp_path / "size.h"
    main.write_text('#include "size.h"\nchar sized[SIZE];\nvoid guest_main(void) { }\n')
    header.write_text("#define SIZE 3\n")
    assert GuestProgram.from_file(main).symbol("sized").size == 3
    header.write_text("#define SIZE 33\n")
    assert GuestProgram.from_file(main).symbol("sized").size == 33
    program._known.clear()
    header.write_text("#define SIZE 333\n")
    assert GuestProgram.from_file(main).symbol("sized").size == 333
    main.write_text('#include "size.h"\nchar sized[SIZE + 1];\nvoid guest_main(void) { }\n')
    assert GuestProgram.from_file(main).symbol("sized").size == 334


def test_an_inline_source_with_more_files(tmp_path: Path) -> None:
    helper = tmp_path / "helper.c"
    helper.write_text("int helper(void) { return 5; }\n")
    source = "int helper(void);\nint got;\nvoid guest_main(void) { got = helper(); }\n"
    program = GuestProgram.from_c(source, sources=[helper])
    assert program.symbol("helper").type == "function"


def test_files_that_cannot_be() -> None:
    with pytest.raises(FileNotFoundError, match=r"guest source /no/such\.c does not exist"):
        GuestProgram.from_file("/no/such.c")
    with pytest.raises(ValueError, match="not a source file"):
        GuestProgram.from_file("/etc/passwd")
    with pytest.raises(ValueError, match="at least one"):
        GuestProgram.from_file()


def test_a_source_from_a_prompt() -> None:
    space: dict[str, object] = {"__name__": "__main__", "GuestProgram": GuestProgram}
    text = "program = GuestProgram.from_c('int typed;\\nvoid guest_main(void) { }\\n')"
    exec(compile(text, "<stdin>", "exec"), space)  # noqa: S102
    program = space["program"]
    assert isinstance(program, GuestProgram)
    assert program.symbol("typed").size == 4
    assert program.line(program.address_of("guest_main")) == ("<stdin>", 2)
    broken = text.replace("int typed", "intt typed")
    with pytest.raises(GuestBuildError, match=r"<stdin>:1:1: error: unknown type name 'intt'"):
        exec(compile(broken, "<stdin>", "exec"), space)  # noqa: S102


def test_no_warning_is_left_over_from_a_clean_build() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert GuestProgram.from_c("void guest_main(void) { }\n").warning == ""

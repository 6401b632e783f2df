# SPDX-License-Identifier: Apache-2.0
"""Exception names and error codes."""

from __future__ import annotations

import pytest

from kvmpy.x86 import exceptions
from kvmpy.x86.exceptions import EXCEPTIONS, Vector


def test_vectors_with_error_codes() -> None:
    assert sorted(exceptions.ERROR_CODE_VECTORS) == [8, 10, 11, 12, 13, 14, 17, 21, 29, 30]


def test_every_vector_is_described() -> None:
    assert sorted(EXCEPTIONS) == sorted(int(vector) for vector in Vector)
    assert {item.kind for item in EXCEPTIONS.values()} == {
        "fault",
        "trap",
        "abort",
        "interrupt",
        "fault/trap",
    }


@pytest.mark.parametrize(
    ("vector", "name"),
    [(0, "#DE"), (2, "NMI"), (13, "#GP"), (29, "#VC"), (15, "vector 15"), (255, "vector 255")],
)
def test_names(vector: int, name: str) -> None:
    assert exceptions.name(vector) == name


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0x0, "no selector"),
        (0x10, "GDT selector 0x10"),
        (0x14, "LDT selector 0x14"),
        (0x1A, "IDT vector 3"),
        (0x213, "IDT vector 66, external event"),
        (0x01, "GDT selector 0x0, external event"),
    ],
)
def test_selector_error_codes(code: int, words: str) -> None:
    assert exceptions.selector_words(code) == words
    assert exceptions.describe_error_code(Vector.GP, code) == words


@pytest.mark.parametrize(
    ("code", "what"),
    [
        (0x72, "CPUID"),
        (0x7B, "IOIO"),
        (0x81, "VMMCALL"),
        (0x400, "NPF"),
        (0x04, "CR4 read"),
        (0x14, "CR4 write"),
        (0x27, "DR7 read"),
        (0x37, "DR7 write"),
        (0x94, "CR4 write trap"),
        (0x51, "exception #AC"),
        (0x7777, "exit code 0x7777"),
    ],
)
def test_vc_error_codes(code: int, what: str) -> None:
    assert exceptions.vc_reason(code) == what


@pytest.mark.parametrize(
    ("vector", "code", "line"),
    [
        (14, 0x7, "#PF page fault (0x7: user write, protection violation)"),
        (13, 0, "#GP general protection (0x0: no selector)"),
        (21, 3, "#CP control protection (0x3: missing ENDBRANCH)"),
        (21, 0x8001, "#CP control protection (0x8001: near RET in an enclave)"),
        (29, 0x7B, "#VC VMM communication (0x7b: IOIO)"),
        (8, 0, "#DF double fault (0x0: always zero)"),
        (17, 5, "#AC alignment check (0x5: 0x5, though always zero)"),
        (6, 0, "#UD invalid opcode"),
        (13, None, "#GP general protection"),
        (66, 0, "vector 66"),
    ],
)
def test_lines(vector: int, code: int | None, line: str) -> None:
    assert exceptions.describe(vector, code) == line

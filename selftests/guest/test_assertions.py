# SPDX-License-Identifier: Apache-2.0
"""Guest assertions hold when they should, and say everything when they do not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvmpy import GuestAssertionError, GuestProgram, MakeVm

HOLDING = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	u64 evaluated = 0;
	int negative = -1;
	u8 small = 255;

	GUEST_ASSERT(true);
	GUEST_ASSERT(small);
	GUEST_ASSERT_EQ(evaluated++, 0u);
	GUEST_ASSERT_EQ(evaluated, 1u);
	GUEST_ASSERT_NE(evaluated, 0u);
	GUEST_ASSERT_LT(negative, 0);
	GUEST_ASSERT_LE(negative, -1);
	GUEST_ASSERT_GT(small, 254);
	GUEST_ASSERT_GE(small, negative);
	GUEST_ASSERT_EQ(&evaluated, &evaluated);
	GUEST_SYNC(evaluated);
}
"""


def test_assertions_that_hold(make_vm: MakeVm) -> None:
    """Assertions that hold evaluate their operands once and say nothing."""
    vm = make_vm.start(HOLDING)
    assert [call.args for call in vm.vcpus[0].syncs()] == [(1,)]


TEMPLATE = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	int x = -3;
	u64 y = 0xffff000000000000ull;

	GUEST_SYNC(x, y);
	%s;
}
"""


@pytest.mark.parametrize(
    ("assertion", "said"),
    [
        ("GUEST_ASSERT(x > 5)", "guest assertion failed: x > 5\n"),
        ("GUEST_ASSERT_EQ(x, 4)", "x == 4\n       got -3 (0xfffffffffffffffd)\n  expected 4 (0x4)\n"),
        ("GUEST_ASSERT_NE(x, -3)", "x != -3\n       got -3 (0xfffffffffffffffd)\n  expected != -3 ("),
        ("GUEST_ASSERT_LT(x, -4)", "x < -4\n       got -3 (0xfffffffffffffffd)\n  expected < -4 ("),
        ("GUEST_ASSERT_LE(y, 1u)", "y <= 1u\n       got 18446462598732840960 (0xffff000000000000)\n"),
        ("GUEST_ASSERT_GT(x, x)", "x > x\n       got -3 ("),
        ("GUEST_ASSERT_GE(x, 0)", "x >= 0\n       got -3 (0xfffffffffffffffd)\n  expected >= 0 (0x0)\n"),
        ("GUEST_ASSERT_EQ((u8)x, 0xfe)", "(u8)x == 0xfe\n       got 253 (0xfd)\n  expected 254 (0xfe)\n"),
        ('GUEST_FAIL("x is %d, y %#llx", x, y)', "guest failed: x is -3, y 0xffff000000000000\n"),
    ],
)  # fmt: skip
def test_assertions_that_fail(make_vm: MakeVm, assertion: str, said: str) -> None:
    """A failing assertion ends the run with its text, both values as their types have them, and the place."""
    vm = make_vm.start(TEMPLATE % assertion)
    vm.vcpus[0].sync()
    with pytest.raises(GuestAssertionError) as caught:
        vm.vcpus[0].run_to_done()
    assert said in caught.value.message
    assert re.search(rf"at {re.escape(__file__)}:\d+:10: vcpu0 in guest_main", caught.value.message)


LOCATED = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	GUEST_ASSERT(0 == 1);
}
"""


def test_an_assertion_points_at_its_line(make_vm: MakeVm) -> None:
    """A failed assertion names the line of the Python file that it stands in."""
    lines = Path(__file__).read_text().splitlines()
    expected = next(number for number, line in enumerate(lines, 1) if line.strip() == "GUEST_ASSERT(0 == 1);")
    vm = make_vm.start(LOCATED)
    with pytest.raises(GuestAssertionError, match=rf"test_assertions\.py:{expected}: vcpu0 in guest_main"):
        vm.vcpus[0].run_to_done()


def test_long_expressions_and_paths_are_cut(make_vm: MakeVm, tmp_path: Path) -> None:
    """An expression and a path that do not fit the slot lose their middle, and the guest does no harm."""
    folder = tmp_path / ("d" * 120) / ("e" * 120)
    folder.mkdir(parents=True)
    source = folder / "long.c"
    long = " + ".join(["value"] * 100)
    head = "#include <kvmpy/guest.h>\nstatic int value;\nvoid guest_main(void)\n{\n"
    source.write_text(f"{head}\tGUEST_ASSERT({long});\n}}\n")
    vm = make_vm.start(GuestProgram.from_file(source))
    with pytest.raises(GuestAssertionError) as caught:
        vm.vcpus[0].run_to_done()
    first, place = caught.value.message.splitlines()
    assert first == f"guest assertion failed: {long[:255]}"
    assert re.fullmatch(r"  at d*/?e{120}/long\.c:5: vcpu0 in guest_main\S*", place)

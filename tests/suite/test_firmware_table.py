# SPDX-License-Identifier: Apache-2.0
"""The table of the firmware's checks: whole, and of what the bench can run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvmpy.uapi.constants import SevRet
from selftests.sev import firmware_table
from selftests.sev.bench import COMMANDS, fields_of
from selftests.sev.bench_commands import BUILDERS
from selftests.sev.firmware_table import Check

CHECKS = firmware_table.read()
REASON = "not reached: "


def test_every_row_is_whole() -> None:
    """A status of the firmware's, a function, and options or a reason."""
    assert len(CHECKS) > 400
    for check in CHECKS:
        status, _, more = check.status.partition(" + ")
        assert f"SEV_RET_{status}" in SevRet.__members__, check
        assert more in ("", "64"), check
        assert check.function.endswith("()"), check
        assert check.text, check
        assert check.options or check.reason.startswith(REASON), check


def test_every_command_has_its_checks() -> None:
    """The table, the bench and the builders know the same commands."""
    named = {check.command for check in CHECKS}
    assert named - {"MAILBOX"} == set(BUILDERS)
    # A message has a builder of its own and no number; PLATFORM_STATUS has no check.
    assert set(BUILDERS) - {"MSG_REPORT_REQ", "MSG_KEY_REQ"} == set(COMMANDS) - {"PLATFORM_STATUS"}


def test_every_command_of_the_software_is_there() -> None:
    """The table of the software's mailbox has no command that the documentation does not have."""
    folder = Path(firmware_table.__file__).parents[2] / "kvmpy" / "lab" / "softsev" / "kernel" / "psp"
    text = (folder / "mailbox.c").read_text(encoding="ascii")
    table = text[text.index("commands[] = {") : text.index("};", text.index("commands[] = {"))]
    renamed = {"LAUNCH_UPDATE_SECRET": "LAUNCH_SECRET", "ATTESTATION_REPORT": "ATTESTATION"}
    names = set(re.findall(r"(?:COMMAND|ANSWERING)\((\w+),", table)) | set(re.findall(r'"(\w+)"', table))
    # SNP_INIT is SNP_INIT_EX without a buffer.
    assert {renamed.get(name, name) for name in names} - {"SNP_INIT"} == set(COMMANDS)


def test_no_check_is_written_twice() -> None:
    keys = [(check.command, check.text) for check in CHECKS]
    assert len(set(keys)) == len(keys)
    scenes = [(check.command, *sorted(check.options.items())) for check in CHECKS if check.options]
    assert len(set(scenes)) == len(scenes)


@pytest.mark.parametrize(
    ("row", "message"),
    [("| a | B | `c()` |", "has 3 cells"), ("| a | B | `c()` | `out` |", "no list of name=value")],
)
def test_a_row_that_is_none(tmp_path: Path, row: str, message: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"### X\n\n| Check | Status | Firmware | Violated by |\n|---|---|---|---|\n{row}\n")
    with pytest.raises(ValueError, match=message):
        firmware_table.read(page)


def test_a_wheel_has_no_page(tmp_path: Path) -> None:
    assert firmware_table.read(tmp_path / "page.md") == []


def test_a_later_check_that_can_fail_beside() -> None:
    """It differs in status, and in what makes it fail."""

    def check(number: int, status: str, **options: str) -> Check:
        return Check("X", number, "", status, "", options, "")

    first = check(1, "A", a="1")
    others = [first, check(2, "A", b="1"), check(3, "B", a="2"), check(4, "B"), check(5, "C", c="1")]
    assert firmware_table.behind(others, first) == others[4]
    assert firmware_table.behind(others, others[4]) is None


def test_sizes_of_buffers() -> None:
    """Those of include/linux/psp-sev.h in Linux, whose structures are packed."""
    sizes = {"INIT": 20, "INIT_EX": 36, "SNP_INIT_EX": 64, "SEND_START": 68, "SNP_LAUNCH_FINISH": 64}
    sizes |= {"LAUNCH_START": 36, "SNP_LAUNCH_UPDATE": 32, "SNP_LAUNCH_START": 48, "SNP_CONFIG": 64}
    sizes |= {"LAUNCH_SECRET": 52, "PLATFORM_STATUS": 12, "ATTESTATION": 36, "DBG_DECRYPT": 28}
    assert {name: sum(fields_of(name).values()) for name in sizes} == sizes

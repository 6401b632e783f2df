# SPDX-License-Identifier: Apache-2.0
"""The archive of a run: what goes in, what is taken out, and the command that makes it."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvmpy.cli.hardware import hardware
from kvmpy.debug.record.events import Chunk, Ioctl
from kvmpy.debug.record.format import Frame, FrameType, What, When
from kvmpy.debug.record.model import Entry, Record
from kvmpy.testing import archive, machine
from kvmpy.testing.machine import KernelLog
from kvmpy.testing.scrub import Scrubber
from kvmpy.uapi import ioctls
from kvmpy.uapi.ioctls import SEV_PLATFORM_COMMANDS

CCP = (
    "the driver ccp (CONFIG_CRYPTO_DEV_SP_PSP) finds no secure processor: enable SEV in the firmware setup "
    "(SMEE, SEV-SNP support) and look at `dmesg | grep -i ccp`"
)


def test_a_record_of_the_kernel_reads_as_in_dmesg() -> None:
    record = b"6,1234,5012345,-;kvm_amd: SEV enabled (ASIDs 33 - 64)\n SUBSYSTEM=x\n"
    assert machine.message(record) == "[    5.012345] kvm_amd: SEV enabled (ASIDs 33 - 64)"


def test_without_permission_the_log_says_why(tmp_path: Path) -> None:
    log = KernelLog(tmp_path / "none")
    assert log.read() == ""
    assert "No such file" in log.missing
    log.close()


def test_the_archive_has_files_and_folders_and_no_leftover(tmp_path: Path) -> None:
    records = tmp_path / "records"
    (records / "deep").mkdir(parents=True)
    (records / "deep" / "one.txt").write_bytes(b"of jdoe")
    # What may hold anything stays out.
    for name in ("broken.rec", "core", "binary.txt"):
        (records / "deep" / name).write_bytes(b"\x00jdoe")
    (records / "latin.txt").write_bytes(b"\xff jdoe")
    (records / "link").symlink_to("/etc/passwd")
    target = tmp_path / "out.tar.gz"
    scrub = Scrubber(host="", user="jdoe", home="", known=())
    names = archive.write(target, {"a.txt": b"by jdoe"}, [("records", records)], scrub)
    assert names == ["a.txt", "records/deep/one.txt"]
    with tarfile.open(target) as tar:
        assert tar.getnames() == ["out/a.txt", "out/records/deep/one.txt"]
        assert tar.extractfile("out/a.txt").read() == b"by <user>"  # type: ignore[union-attr]
        assert tar.extractfile("out/records/deep/one.txt").read() == b"of <user>"  # type: ignore[union-attr]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.tar.gz", "records"]
    assert target.stat().st_mode & 0o777 == 0o600


def sev_record(path: Path, name: str, answer: bytes) -> None:
    """Write a record of one command of /dev/sev whose *answer* lies behind its pointer."""
    command = SEV_PLATFORM_COMMANDS[name].id.to_bytes(4, "little") + (0x5000).to_bytes(8, "little") + bytes(4)
    chunks = (
        Chunk(0x1000, command, int(When.IN), int(What.ARGUMENT)),
        Chunk(0x5000, answer, int(When.OUT), int(What.NESTED)),
    )
    ioctl = Ioctl(1, 3, ioctls.SEV_ISSUE_CMD.nr, 0x1000, 0, 0, 2, 2, chunks)
    entries = [Entry(Frame(FrameType.IOCTL, b"", 7, 7, 1, 1), ioctl)]
    Record({"command": "/home/jdoe/vmm", "kernel": "7.2"}, entries).save(path)


@pytest.mark.parametrize(("name", "stays"), [("SEV_GET_ID2", False), ("SNP_PLATFORM_STATUS", True)])
def test_records_go_in_without_what_names_the_chip(name: str, stays: bool, tmp_path: Path) -> None:
    folder = tmp_path / "records"
    folder.mkdir()
    sev_record(folder / "a.rec", name, b"the chip's own id")
    target = tmp_path / "out.tar.gz"
    scrub = Scrubber(host="", user="jdoe", home="/home/jdoe", known=())
    assert archive.write(target, {}, [("records", folder)], scrub) == ["records/a.rec"]
    with tarfile.open(target) as tar:
        data = tar.extractfile("out/records/a.rec").read()  # type: ignore[union-attr]
    record = Record.from_bytes(data)
    assert record.host == {"command": "~/vmm", "kernel": "7.2"}
    payload = record.entries[0].what
    assert isinstance(payload, Ioctl)
    assert (payload.chunks[1].data == b"the chip's own id") is stays
    assert len(payload.chunks[1].data) == len(b"the chip's own id")
    assert (b"the chip's own id" in data) is stays


def test_the_machine_is_described_without_its_serial_numbers() -> None:
    """What decides a diagnosis from afar is there, and the numbers that name one machine are not."""
    result = machine.machine()
    assert result["kernel"] == os.uname().release
    assert result["cmdline"] == Path("/proc/cmdline").read_text().strip()
    assert result["limits"]["MEMLOCK"] == resource.getrlimit(resource.RLIMIT_MEMLOCK)
    assert result["limits"]["NOFILE"] == resource.getrlimit(resource.RLIMIT_NOFILE)
    assert {"ccp", "kvm", "kvm_amd"} == set(result["parameters"])
    assert ("microcode" in result) is ("microcode" in Path("/proc/cpuinfo").read_text())
    assert not {"product_serial", "board_serial", "product_uuid", "chassis_serial"} & set(result)


def test_the_platforms_status_is_told_or_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMPY_DEV_SEV", str(tmp_path / "sev"))
    assert machine.platform_status() == {"/dev/sev": f"{tmp_path / 'sev'} does not exist: {CCP}"}
    (tmp_path / "sev").write_bytes(b"")  # no device: every command is ENOTTY
    told = machine.platform_status()
    assert sorted(told) == ["SEV_PLATFORM_STATUS", "SNP_PLATFORM_STATUS"]
    assert all("ENOTTY" in text for text in told.values())


class Ring(KernelLog):
    """A kernel log that has this text and no more."""

    def __init__(self, text: str) -> None:
        self.missing = ""
        self._text = text

    def read(self) -> str:
        """Return it."""
        return self._text


def test_the_boot_log_comes_from_the_journal_where_the_ring_lost_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = "[    0.000000] Linux version 7.2\n[    1.000000] ccp: SEV firmware 1.55\n"
    assert machine.boot_log(Ring(whole)) == whole
    monkeypatch.setenv("PATH", str(tmp_path))
    late = "[  900.000000] late\n"
    assert machine.boot_log(Ring(late)) == f"(the first messages are lost: boot with log_buf_len=4M)\n{late}"
    tool = tmp_path / "journalctl"
    tool.write_text("#!/bin/sh\n[ \"$1 $2\" = '-k -b' ] && echo '[    0.0] Linux version 7.2'\n")
    tool.chmod(0o755)
    assert machine.boot_log(Ring(late)) == "[    0.0] Linux version 7.2\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-o", "x.zip"], "ends in .tar.gz"),
        (["-o", "/nonexistent/x.tar.gz"], "no folder /nonexistent"),
        (["sev/test_nothing.py"], "neither in the suite"),
    ],
)
def test_a_bad_argument_is_refused_before_anything_runs(
    arguments: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(hardware, arguments)
    assert result.exit_code == 2
    assert text in result.output
    assert "what this machine offers" not in result.output
    assert not list(tmp_path.iterdir())


def test_a_run_ends_in_one_archive_and_the_suites_status(tmp_path: Path) -> None:
    test = tmp_path / "test_two.py"
    test.write_text(
        "def test_good():\n    pass\n\n\ndef test_bad():\n    raise ValueError\n", encoding="utf-8"
    )
    target = tmp_path / "made.tar.gz"
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "kvmpy",
            "hardware",
            "-o",
            str(target),
            "--require",
            "",
            "--no-bench",
            str(test),
        ],
        capture_output=True,
        timeout=110,
        check=False,
        cwd=tmp_path,
    )
    assert result.returncode == 1, result.stderr
    with tarfile.open(target) as archive:
        names = {name.removeprefix("made/") for name in archive.getnames()}
        verdicts = json.load(archive.extractfile("made/verdicts.json"))  # type: ignore[arg-type]
    assert names == {
        *("machine.json", "platform.json", "boot.txt", "dmesg.txt", "doctor.txt", "run.txt", "steps.jsonl"),
        *("verdicts.json", "verdicts.ktap", "report.html", "journal.jsonl"),
    }
    assert sorted(entry["verdict"] for entry in verdicts["tests"]) == ["fail", "pass"]

# SPDX-License-Identifier: Apache-2.0
"""Malformed inputs of every format that kvmpy reads: a clear error or success, soon, and nothing else."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from kvmpy.coco import idblock
from kvmpy.coco.certificates import Chain, certified_tcb, load
from kvmpy.coco.manifest import Manifest, ManifestError
from kvmpy.coco.report import ReportError
from kvmpy.debug.record.events import Ioctl, unpack
from kvmpy.debug.record.format import FrameReader, RecordError
from kvmpy.debug.record.model import Record
from kvmpy.debug.record.prune import target_of
from kvmpy.debug.record.repro import write_c
from kvmpy.debug.record.script import ProcessesError, build
from kvmpy.parsing import MalformedError, parse_json
from kvmpy.testing import errata, html, journal
from kvmpy.uapi.ioctls import KVM_SET_REGS
from tests.coco.attestation import Authority
from tests.torture import records
from tests.torture.conftest import Torture

# CPU seconds of one input.
LIMIT = 5.0
WORDS = [
    b"*",
    b"*" * 40,
    b"null",
    b"-1",
    b"1e999",
    b"NaN",
    b"2147483648",
    b"18446744073709551616",
    b"9" * 5000,
]
WORDS += [b"\\ud800", b"\xff\xfe", b"\x00", b"[" * 2000, b"{}", b'""', b"true", b"0.5", b"\xe2\x80\xa8"]


def mutate(data: bytes, numbers: random.Random) -> bytes:
    """Return *data* with one to four changes: bits, bytes, ranges, and words that parsers dislike."""
    content = bytearray(data)
    for _ in range(numbers.randint(1, 4)):
        offset = numbers.randrange(len(content) + 1)
        end = min(len(content), offset + numbers.choice([1, 1, 2, 8, 64]))
        kind = numbers.randrange(6)
        if kind == 0 and offset < len(content):
            content[offset] ^= 1 << numbers.randrange(8)
        elif kind == 1:
            del content[offset:end]
        elif kind == 2:
            content[offset:offset] = content[offset:end]
        elif kind == 3:
            content[offset:end] = numbers.choice(WORDS)
        elif kind == 4:
            del content[offset:]
        else:
            content[offset:end] = numbers.randbytes(end - offset)
    return bytes(content)


def reshape(text: bytes, numbers: random.Random) -> bytes:
    """Return a JSON document in which one value has become another: still JSON, no longer the format."""
    values = json.loads(text)
    places: list[tuple[object, object]] = []

    def walk(value: object) -> None:
        items = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        for key, entry in list(items):
            places.append((value, key))
            walk(entry)

    walk(values)
    holder, key = numbers.choice(places)
    wrong: list[object] = [
        None,
        -1,
        1 << 31,
        1 << 70,
        0.5,
        "x",
        "\ud800",
        "\x00",
        [],
        {},
        [[]],
        True,
        "*" * 50,
    ]
    if numbers.random() < 0.2:
        del holder[key]  # type: ignore[attr-defined]
    else:
        holder[key] = numbers.choice(wrong)  # type: ignore[index]
    return json.dumps(values).encode()


Reader = Callable[[bytes], object]
Format = tuple[bytes, Reader, tuple[type[Exception], ...]]


def _report() -> bytes:
    test = {
        "nodeid": "a.py::t", "id": "a.py::t", "area": "a", "promise": "p", "protection": "none",
        "platform": "host", "verdict": "fail", "reason": "r", "missing": ["x"], "how": ["y"],
        "duration": 0.5, "postmortem": "pm", "details": "d", "ioctls": [{"ms": 1, "ioctl": "KVM_RUN"}],
        "memory_maps": [{"vm": "vm0", "map": 0}],
    }  # fmt: skip
    host = {
        "kernel": "6.1 x", "cpu": "c", "vendor_modules": ["kvm_amd"], "platform": "host", "accelerator": "",
        "kvm": True, "kvm_missing": "", "vm_types": ["default"],
        "protections": {"none": {"available": True, "missing": "", "label": ""}},
    }  # fmt: skip
    return json.dumps(
        {
            "schema": "kvmpy-report/1", "kvmpy": "0", "platform": "host", "host": host, "seed": 1,
            "duration": 1.5, "exit_status": 1,
            "summary": {"pass": 0, "fail": 1, "skip": 0, "xfail": 0, "lost": 0},
            "memory_growth_per_test": 0, "tests": [test, {**test, "id": "b.py::u"}],
            "memory_maps": [{"type": "default", "segments": ["0 1000"]}], "not_run": [], "skips": [],
        }
    ).encode()  # fmt: skip


def _record() -> bytes:
    from kvmpy.debug.record.events import Lines, Object, Payload
    from kvmpy.debug.record.format import FileHeader, ObjectKind, pack_frame

    frames: list[Payload] = [
        Lines({"kvmpy": "0", "machine": "x86_64"}),
        Object(1, 0, 3, ObjectKind.SYSTEM, 0, "kvm"),
    ]
    frames += [Object(2, 1, 4, 99, 0, "something new")]
    packed = [
        pack_frame(frame.TYPE, frame.pack(), 1, 1, number, number) for number, frame in enumerate(frames, 1)
    ]
    return FileHeader().pack() + b"".join(packed)


def _read_record(data: bytes) -> None:
    reader = FrameReader(data, resync=True)
    reader.check()
    for frame in reader:
        unpack(frame)


def _read_errata(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    facts = errata.HostFacts("6.18.4-x", "kvm_amd", "AMD EPYC")
    errata.find(errata.load([path]), "memory/test_a.py::test_b" + "a" * 200, facts, "cbit")


def _read_manifest(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    Manifest.read(path)


def _chain() -> bytes:
    given = Authority()
    return b"".join(
        entry.public_bytes(Encoding.PEM) for entry in (given.leaf, given.intermediate, given.root)
    )


def _read_certificates(data: bytes) -> None:
    chain = Chain.of(load([data]))
    certified_tcb(chain.leaf)
    chain.verify()


def _read_key(data: bytes) -> None:
    key = idblock.load_key(data)
    idblock.IdBlock(bytes(48), 0x30000).sign(key)


def _read_auth(data: bytes) -> None:
    idblock.IdAuth.from_bytes(data).verify(idblock.IdBlock(bytes(48), 0x30000))


def _formats(folder: Path) -> dict[str, Format]:
    key = idblock.generate_key()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    auth = idblock.IdBlock(bytes(48), 0x30000).sign(key, key).to_bytes()
    (folder / "page.bin").write_bytes(bytes(8192))
    (folder / "vmsa.bin").write_bytes(bytes(4096))
    manifest = {
        "pages": [{"gpa": "0x1000", "type": "normal", "file": "page.bin"},
                  {"gpa": 16384, "type": "zero", "pages": 2}],
        "vmsas": ["vmsa.bin"],
    }  # fmt: skip
    events = [{"event": "session", "seed": 7, "pid": 1}, {"event": "selected", "ids": ["a", "b"]}]
    events += [{"event": "start", "nodeid": "a", "limit": 3.0, "location": ["a.py", 1, "a"]}]
    events += [
        {"event": "report", "nodeid": "a", "data": {"when": "teardown"}},
        {"event": "lost", "nodeid": "b"},
    ]
    lines = b"\n".join(json.dumps(event).encode() for event in events)
    path = folder / "input"

    def read_journal(data: bytes) -> None:
        path.write_bytes(data)
        journal.read(path)

    return {
        "report": (_report(), lambda data: html.render(html.reports_in(parse_json(data), "r")),
                   (MalformedError, html.ReportError)),
        "errata": (errata.BUILTIN.read_bytes()[:6000].rpartition(b"[[erratum]]")[0],
                   lambda data: _read_errata(path, data), (errata.ErrataError,)),
        "manifest": (json.dumps(manifest).encode(),
                     lambda data: _read_manifest(path, data), (ManifestError,)),
        "certificates": (_chain(), _read_certificates, (ReportError,)),
        "ID key": (pem, _read_key, (ValueError,)),
        "ID auth": (auth, _read_auth, (ValueError,)),
        "record": (_record(), _read_record, (RecordError,)),
        "journal": (lines, read_journal, ()),
    }  # fmt: skip


def test_malformed_inputs_are_told(torture: Torture, tmp_path: Path) -> None:
    """Files of every format with seeded changes: read, or refused with an error of that format, in time."""
    formats = _formats(tmp_path)
    for data, read, _ in formats.values():
        read(data)
    inputs = refused = 0
    slowest = 0.0
    for _ in torture.rounds(20):
        for name, (valid, read, allowed) in formats.items():
            wanted = name in ("report", "manifest") and torture.random.random() < 0.5
            data = (reshape if wanted else mutate)(valid, torture.random)
            started = time.process_time()
            try:
                read(data)
            except allowed:
                refused += 1
            except Exception as error:
                raise AssertionError(f"{name}: {error!r} for {data!r}") from error
            slowest = max(slowest, time.process_time() - started)
            assert slowest < LIMIT, f"{name}: {slowest:.1f} s for {data!r}"
            inputs += 1
    assert 0 < refused < inputs
    torture.figure("malformed inputs", inputs)
    torture.figure("refused", refused)
    torture.figure("slowest", slowest * 1000, "ms")


GCC = ("gcc", "-O0", "-w", "-pthread", "-fsyntax-only", "-x", "c", "-")


def test_a_record_that_says_something_else_is_told(torture: Torture) -> None:
    """Frames with right checksums and other content: read, shown, written as C that compiles, or refused."""
    valid = records.record()
    assert records.use(valid)
    inputs = refused = written = compiled = 0
    for _ in torture.rounds(40):
        data = records.repack(valid, mutate, torture.random)
        started = time.process_time()
        try:
            text = records.use(data)
        except (RecordError, ProcessesError):
            refused += 1
        except Exception as error:
            raise AssertionError(f"{error!r} for {data!r}") from error
        else:
            written += bool(text)
            if text and written % 40 == 1 and shutil.which("gcc"):
                done = subprocess.run(
                    GCC, input=text, text=True, capture_output=True, timeout=60, check=False
                )
                assert not done.returncode, f"{done.stderr} for {data!r}"
                compiled += 1
        assert time.process_time() - started < LIMIT, data
        inputs += 1
    assert written
    torture.figure("records with other content", inputs)
    torture.figure("refused", refused)
    torture.figure("written as C", written)
    torture.figure("compiled of those", compiled)


def test_an_argument_that_could_be_read_in_part_is_written_as_c() -> None:
    """Of KVM_SET_REGS that lay at the end of readable memory a recorder has the begin."""
    whole = Record.from_bytes(records.record())
    entries = [
        entry.but(replace(entry.what, chunks=(replace(entry.what.chunks[0], data=bytes(7)),)))
        if isinstance(entry.what, Ioctl) and entry.what.request == KVM_SET_REGS.nr
        else entry
        for entry in whole.entries
    ]
    script = build(whole.with_entries(entries))
    assert "KVM_SET_REGS" in write_c(script, target_of(script))


COMMANDS = [
    ["decode", "0xc008aeba", "00" * 24],
    ["decode", "kvm_sregs", "00" * 312],
    ["decode", "exit", "39", "00" * 400],
    ["decode", "errno", "EINVAL", "KVM_RUN"],
    ["decode", "pferr", "0x200000004"],
    ["decode", "msr", "EFER", "0x500"],
    ["decode", "cpuid", "1", "2", "3", "4", "5"],
    ["decode", "sev-error", "0x16"],
    ["decode", "policy", "snp", "0x30000"],
    ["decode", "vmsa", "00" * 600],
    ["decode", "vmcb", "ff" * 600],
    ["decode", "ghcb", "00" * 600],
    ["encode", "KVM_SET_MSRS", "index=TSC", "data=5"],
    ["encode", "kvm_sregs", "cs.base=0xf0000", "interrupt_bitmap[1]=2"],
    ["encode", "exit", "IO", "io.port=0x3f8"],
    ["encode", "cpuid", "avx2"],
    ["encode", "policy", "snp", "smt", "abi_major=1"],
    ["encode", "vmsa", "rip=0xfff0"],
    ["encode", "vmcb", "exit_code=0x400"],
    ["encode", "ghcb", "sw_exit_code=0x72", "rax=1"],
]
ODD = [
    "",
    "-1",
    "99999999999999999999999",
    "0x",
    "x",
    "@",
    "@/",
    "@\0",
    "\udc80",
    "[0]",
    "a[99999999]=1",
    "=",
    "é",
]
ODD += [
    "data[-1]=1",
    "1" * 5000,
    "0x" + "f" * 200,
    "ff" * 3,
    "-",
    "0b2",
    "\n",
    "index=index",
    "cs=1",
    "abi_major=-1",
]


def test_decode_and_encode_tell_what_they_do_not_understand(torture: Torture) -> None:
    """Arguments with seeded changes end in output or a message, never in a traceback."""
    from kvmpy.cli.main import main

    runner = CliRunner()
    inputs = 0
    for _ in torture.rounds(100):
        words = list(torture.random.choice(COMMANDS))
        for _ in range(torture.random.randint(1, 2)):
            start = torture.random.randrange(1, len(words))
            kind = torture.random.randrange(4)
            if kind == 0:
                words[start] = torture.random.choice(ODD)
            elif kind == 1:
                words.insert(start, torture.random.choice(ODD))
            elif kind == 2 and len(words) > 2:
                del words[start]
            else:
                words[start] = mutate(words[start].encode("utf-8", "surrogateescape"), torture.random).decode(
                    "latin-1"
                )
            if len(words) < 2:
                words.append("x")
        started = time.process_time()
        result = runner.invoke(main, words, input=b"00")
        assert result.exception is None or isinstance(result.exception, SystemExit), (
            f"{words!r}: {result.exception!r}"
        )
        assert time.process_time() - started < LIMIT, words
        inputs += 1
    torture.figure("command lines", inputs)


@pytest.mark.parametrize("pattern", ["*a" * 60 + "b", "*" * 500 + "b", "?*" * 100 + "b"])
def test_a_pattern_of_an_erratum_takes_no_exponential_time(pattern: str) -> None:
    """Matching takes the time of the text's length times the pattern's."""
    started = time.process_time()
    assert not errata.glob_match(pattern, "a" * 5000)
    assert time.process_time() - started < LIMIT

# SPDX-License-Identifier: Apache-2.0
"""`kvmpy trace` on launches of SEV, SEV-ES and SNP guests: the commands, and what the firmware refused."""

from __future__ import annotations

import re
import sys

import pytest

from tests.coco.test_launch_streams import LAUNCHES, documented
from tests.debug.tracing import Trace

# Where both the tracer and the program are emulated, and the recorder is compiled first.
LONG = 270
pytestmark = pytest.mark.timeout(LONG + 30)

LAUNCH = """
import sys
from kvmpy import Kvm
from tests.coco.test_launch_streams import LAUNCHES
with Kvm() as kvm:
    LAUNCHES[sys.argv[1]](kvm)
"""

REFUSED = """
from kvmpy import Kvm
from kvmpy.coco.policy import SevPolicy
from kvmpy.coco.sev_launch import SevInitialised
from kvmpy.core.sev_errors import SevError
from kvmpy.uapi.constants import VmType
with Kvm() as kvm, kvm.create_vm(int(VmType.KVM_X86_SEV_VM)) as vm:
    state = SevInitialised.init2(vm, es=False)
    try:
        state.start(SevPolicy(es=True))
    except SevError as error:
        print(error)
"""


def told(trace: Trace) -> list[str]:
    """Return the ioctls of a trace, SEV's by their commands; without those of files in general."""
    assert trace.status == 0, trace.other
    texts = [row["text"] for row in trace.rows if not row["ioctl"].startswith("0x")]
    print("\n".join(texts))
    matched = [re.match(r"KVM_MEMORY_ENCRYPT_OP \{id=(\w+)", text) for text in texts]
    return [match[1] if match else text.split()[0] for match, text in zip(matched, texts, strict=True)]


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=pytest.mark.requires(f"protection:{name}"), id=f"{name}{way}")
        for name, way in [*((name, "") for name in LAUNCHES), ("snp", "--ptrace")]
    ],
)
def test_the_commands_of_a_launch(name: str, way: str) -> None:
    """They come by name, in the documented order."""
    trace = Trace(*([way] if way else []), "--", sys.executable, "-c", LAUNCH, name, timeout=LONG)
    result = told(trace)
    assert result[result.index("KVM_CREATE_VM") :] == [
        line for line in documented(name) if not line.startswith(" ")
    ]


@pytest.mark.requires("protection:snp")
def test_arguments_and_what_became_of_them() -> None:
    """The struct behind the command is decoded, as it went in and as it came back, and the page behind it."""
    trace = Trace("--", sys.executable, "-c", LAUNCH, "snp", timeout=LONG)
    told(trace)
    texts = [row["text"] for row in trace.rows if "KVM_SEV_SNP_LAUNCH_UPDATE" in row["text"]]
    page, zero = texts
    assert re.search(
        r"\*data=\{gfn_start=0x100, uaddr=0x\w+, len=0x1000, type=KVM_SEV_SNP_PAGE_TYPE_NORMAL\} -> "
        r"\{gfn_start=0x101, uaddr=0x\w+, type=KVM_SEV_SNP_PAGE_TYPE_NORMAL\} data\.\*uaddr=<5a5a5a",
        page,
    )
    assert "*data={gfn_start=0x101, len=0x1000, type=KVM_SEV_SNP_PAGE_TYPE_ZERO} -> {gfn_start=0x102" in zero


@pytest.mark.requires("protection:sev")
def test_what_the_firmware_refused() -> None:
    """Its code is told by name and meaning, beside the errno that KVM makes of it."""
    trace = Trace("--", sys.executable, "-c", REFUSED, timeout=LONG)
    assert told(trace)[-2:] == ["KVM_SEV_INIT2", "KVM_SEV_LAUNCH_START"]
    text = trace.rows[-1]["text"]
    assert "error=SEV_RET_INVALID_ASID" in text
    assert "[firmware: the ASID is out of range" in text
    assert "= -1 EIO" in text
    assert "INVALID_ASID" in trace.stdout

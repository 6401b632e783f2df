# SPDX-License-Identifier: Apache-2.0
"""Fixtures for the uapi tests: a compiler, and small kernel header trees to compare with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

IOCTL_H = """#define _IOC(d, t, n, s) (((d) << 30) | ((s) << 16) | ((t) << 8) | (n))
#define _IO(t, n) _IOC(0U, t, n, 0)
#define _IOW(t, n, s) _IOC(1U, t, n, sizeof(s))
#define _IOR(t, n, s) _IOC(2U, t, n, sizeof(s))
#define _IOWR(t, n, s) _IOC(3U, t, n, sizeof(s))
"""

ASM_KVM_H = """typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
struct kvm_dtable { __u64 base; __u16 limit; __u16 padding[3]; };
struct kvm_cpuid_entry2 {
	__u32 function; __u32 index; __u32 flags; __u32 eax; __u32 ebx; __u32 ecx; __u32 edx;
	__u32 padding[3];
};
struct kvm_cpuid2 { __u32 nent; __u32 padding; struct kvm_cpuid_entry2 entries[]; };
"""

KVM_H = """#include <linux/ioctl.h>
#include <asm/kvm.h>
#define KVMIO 0xAE
#define KVM_CAP_IRQCHIP 0
#define KVM_CAP_GUEST_MEMFD 234
#define KVM_SIGNATURE "text"
#define KVM_DOUBLE(x) ((x) * 2)
struct kvm_irq_level {
	union { __u32 irq; int status; };
	__u32 level;
};
struct kvm_enc_region { __u64 addr; __u64 size; };
#define KVM_RUN _IO(KVMIO, 0x80)
#define KVM_IRQ_LINE _IOW(KVMIO, 0x61, struct kvm_irq_level)
#define KVM_GET_CPUID2 _IOWR(KVMIO, 0x91, struct kvm_cpuid2)
enum { KVM_SEV_INIT = 0, KVM_SEV_ES_INIT };
"""


@pytest.fixture(scope="session")
def gcc() -> str:
    """The C compiler; the test is skipped when there is none."""
    program = shutil.which("gcc")
    if program is None:
        pytest.skip("gcc is not installed (apt-get install gcc libc6-dev)")
    return program


@pytest.fixture
def header_tree(tmp_path: Path) -> Callable[..., Path]:
    """Make a header tree that agrees with kvmpy, after replacing text in linux/kvm.h or asm/kvm.h."""

    def make(*changes: tuple[str, str], add: str = "") -> Path:
        kvm, asm = KVM_H, ASM_KVM_H
        for old, new in changes:
            assert (old in kvm) != (old in asm), f"{old!r} must be in one of the files"
            kvm, asm = kvm.replace(old, new), asm.replace(old, new)
        for name, text in (("linux/kvm.h", kvm + add), ("asm/kvm.h", asm), ("linux/ioctl.h", IOCTL_H)):
            path = tmp_path / "include" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make

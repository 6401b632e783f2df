# SPDX-License-Identifier: Apache-2.0
"""Compiles ``bare.c`` and gives its functions to the figures."""

from __future__ import annotations

import hashlib
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cffi

from kvmpy.core.address import PAGE_SIZE
from kvmpy.core.errors import MissingError
from kvmpy.guest import cache, toolchain
from kvmpy.uapi import ioctls
from kvmpy.uapi.constants import KVM_CAP_SPLIT_IRQCHIP, KVM_EXIT_IO

if TYPE_CHECKING:
    from kvmpy.guest.vm import GuestVm

_HERE = Path(__file__).resolve().parent
_UAPI = _HERE.parent.parent / "uapi"
_FLAGS = ("-O2", "-shared", "-fPIC", "-std=gnu11", "-Wall")
_COMPILE_TIMEOUT = 60

_DECLARATIONS = """
struct bare_life {
    int kvm;
    int split_irqchip_cap;
    uint64_t memory;
    uint64_t run_size;
    uint32_t exit_reason;
    uint32_t npages;
    const uint64_t *gpas;
    const void *pages;
    const void *cpuid;
    const void *sregs;
    const void *regs;
    uint64_t req_create_vm, req_enable_cap, req_set_memory, req_create_vcpu;
    uint64_t req_set_cpuid, req_get_sregs, req_set_sregs, req_set_regs, req_run;
};
uint64_t bare_run(int vcpu, uint64_t request, uint64_t count);
uint64_t bare_life(const struct bare_life *l);
uint64_t bare_fill(uint64_t count);
uint64_t bare_copy(void *to, const void *from, uint64_t size, uint64_t count);
uint64_t bare_convert(int vm, uint64_t request, uint64_t address, uint64_t size, uint64_t count);
uint64_t bare_snp_update(int vm, uint64_t request, int sev_fd, uint64_t gfn, const void *source,
                         uint64_t size);
uint64_t bare_sev_update(int vm, uint64_t request, int sev_fd, void *memory, uint64_t size);
uint64_t bare_pre_fault(int vcpu, uint64_t request, uint64_t gpa, uint64_t size);
struct bare_sha384 {
    const void *md;
    void *(*new)(void);
    void (*free)(void *ctx);
    int (*init)(void *ctx, const void *md, void *engine);
    int (*update)(void *ctx, const void *data, size_t size);
    int (*final)(void *ctx, unsigned char *value, unsigned int *size);
};
int bare_sha384(struct bare_sha384 *s, const char *libcrypto);
uint64_t bare_digest(const struct bare_sha384 *s, unsigned char *value, const unsigned char *data,
                     uint64_t size, uint64_t gpa);
"""
_LIBCRYPTO = re.compile(r"\S*/libcrypto\S*\.so\S*$", re.MULTILINE)


class BareError(RuntimeError):
    """The bare side of a figure failed where kvmpy's side works."""


def _library() -> Path:
    tools = toolchain.find()
    parts = [
        (_HERE / "bare.c").read_bytes(),
        *(path.read_bytes() for path in sorted((_UAPI / "cdef").glob("*.h"))),
    ]
    key = (
        "bench-"
        + hashlib.sha256(b"\0".join([*parts, tools.identity.encode(), repr(_FLAGS).encode()])).hexdigest()
    )

    def build(folder: Path) -> None:
        command = [tools.cc, *_FLAGS, f"-I{_UAPI}", "-o", str(folder / "bare.so"), str(_HERE / "bare.c")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT, check=False)
        if done.returncode:
            raise BareError(f"bare.c does not compile:\n{done.stderr}")

    return (cache.entry(key) if cache.entry(key).is_dir() else cache.create(key, build)) / "bare.so"


class Bare:
    """The compiled C side; every time is in nanoseconds."""

    def __init__(self) -> None:
        self._ffi = cffi.FFI()
        self._ffi.cdef(_DECLARATIONS)
        self._lib: Any = self._ffi.dlopen(str(_library()))

    @staticmethod
    def _took(nanoseconds: int, action: str) -> int:
        if nanoseconds == 0:
            raise BareError(f"the bare {action} failed")
        return nanoseconds

    def run(self, vcpu: int, count: int) -> int:
        """Issue KVM_RUN *count* times on the file descriptor *vcpu* and look at nothing."""
        return self._took(self._lib.bare_run(vcpu, ioctls.KVM_RUN.nr, count), "KVM_RUN loop")

    def fill(self, count: int) -> int:
        """Write *count* page-table entries into fresh memory."""
        return self._took(self._lib.bare_fill(count), "fill")

    def copy(self, to: memoryview, source: memoryview, count: int) -> int:
        """Copy *source* over *to*, *count* times."""
        target, origin = self._ffi.from_buffer(to), self._ffi.from_buffer(source)
        return self._took(self._lib.bare_copy(target, origin, len(source), count), "copy")

    def convert(self, vm: int, gpa: int, size: int, count: int) -> int:
        """Make *size* bytes private and shared in turn, *count* ioctls in all."""
        number = ioctls.KVM_SET_MEMORY_ATTRIBUTES.nr
        return self._took(self._lib.bare_convert(vm, number, gpa, size, count), "conversion loop")

    def pre_fault(self, vcpu: int, gpa: int, size: int) -> int:
        """Map a range in advance."""
        number = ioctls.KVM_PRE_FAULT_MEMORY.nr
        return self._took(self._lib.bare_pre_fault(vcpu, number, gpa, size), "KVM_PRE_FAULT_MEMORY")

    def snp_update(self, vm: int, sev_fd: int, gfn: int, source: memoryview) -> int:
        """Copy *source* into an SNP guest from *gfn* on (KVM_SEV_SNP_LAUNCH_UPDATE)."""
        number, origin = ioctls.KVM_MEMORY_ENCRYPT_OP.nr, self._ffi.from_buffer(source)
        return self._took(
            self._lib.bare_snp_update(vm, number, sev_fd, gfn, origin, len(source)), "SNP_LAUNCH_UPDATE"
        )

    def sev_update(self, vm: int, sev_fd: int, memory: memoryview) -> int:
        """Encrypt guest memory in place (KVM_SEV_LAUNCH_UPDATE_DATA)."""
        number, place = ioctls.KVM_MEMORY_ENCRYPT_OP.nr, self._ffi.from_buffer(memory)
        return self._took(
            self._lib.bare_sev_update(vm, number, sev_fd, place, len(memory)), "LAUNCH_UPDATE_DATA"
        )

    def openssl(self) -> OpenSsl:
        """Take SHA-384 from the OpenSSL that this Python uses; MissingError where it has none to share."""
        return OpenSsl(self, self._ffi, self._lib)

    def life(self, model: GuestVm) -> Life:
        """Take what a VM like *model* (launched, one vCPU, not yet run) is made of."""
        return Life(self, self._ffi, self._lib, model)


class OpenSsl:
    """A launch digest by a C program with OpenSSL; :attr:`value` is what it is so far."""

    def __init__(self, bare: Bare, ffi: Any, lib: Any) -> None:
        self._bare, self._ffi, self._lib = bare, ffi, lib
        self._sha384 = ffi.new("struct bare_sha384 *")
        self._value = ffi.new("unsigned char[48]")
        mapped = _LIBCRYPTO.search(Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace"))
        if mapped is None or not lib.bare_sha384(self._sha384, mapped[0].encode()):
            raise MissingError("OpenSSL's libcrypto as a shared library", "a Python that is linked with one")

    @property
    def value(self) -> bytes:
        """The digest, 48 bytes."""
        return bytes(self._ffi.buffer(self._value))

    def add(self, gpa: int, pages: memoryview) -> int:
        """Extend the digest by normal *pages* from *gpa* on."""
        data = self._ffi.from_buffer("unsigned char[]", pages)
        taken = self._lib.bare_digest(self._sha384, self._value, data, len(pages), gpa)
        return self._bare._took(taken, "digest")


class Life:
    """The ioctl sequence of one VM's life, from nothing to its first exit and away again."""

    def __init__(self, bare: Bare, ffi: Any, lib: Any, model: GuestVm) -> None:
        self._bare, self._lib = bare, lib
        segment = model.memory.segments()[0]
        gpas = []
        pages = []
        for gfn in sorted(model.allocator.used):
            page = bytes(segment.shared.view(gfn * PAGE_SIZE, PAGE_SIZE))
            if any(page):
                gpas.append(gfn * PAGE_SIZE)
                pages.append(page)
        vcpu = model.vcpus[0]
        cpuid, sregs, regs = vcpu.cpuid.get(), vcpu.regs.get_sregs(), vcpu.regs.get()
        # lifetime: _keep holds what the struct points to.
        self._keep = (
            ffi.new("uint64_t[]", gpas),
            ffi.from_buffer(b"".join(pages)),
            ffi.from_buffer(cpuid.to_bytes()),
            ffi.from_buffer(sregs.to_bytes()),
            ffi.from_buffer(regs.to_bytes()),
        )
        self._life = ffi.new("struct bare_life *")
        life = self._life
        life.kvm, life.split_irqchip_cap = model.kvm.fd, KVM_CAP_SPLIT_IRQCHIP
        life.memory, life.run_size = segment.size, model.kvm.vcpu_mmap_size
        life.exit_reason, life.npages = KVM_EXIT_IO, len(gpas)
        life.gpas, life.pages, life.cpuid, life.sregs, life.regs = self._keep
        life.req_create_vm, life.req_enable_cap = ioctls.KVM_CREATE_VM.nr, ioctls.KVM_ENABLE_CAP.nr
        life.req_set_memory = ioctls.KVM_SET_USER_MEMORY_REGION.nr
        life.req_create_vcpu, life.req_set_cpuid = ioctls.KVM_CREATE_VCPU.nr, ioctls.KVM_SET_CPUID2.nr
        life.req_get_sregs, life.req_set_sregs = ioctls.KVM_GET_SREGS.nr, ioctls.KVM_SET_SREGS.nr
        life.req_set_regs, life.req_run = ioctls.KVM_SET_REGS.nr, ioctls.KVM_RUN.nr

    def once(self) -> int:
        """Live it once."""
        return self._bare._took(self._lib.bare_life(self._life), "life of a VM")

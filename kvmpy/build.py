# SPDX-License-Identifier: Apache-2.0
"""Build what is generated (:mod:`kvmpy.gen`), then the cffi extension ``kvmpy.uapi._native`` (limited API).

The declarations in ``uapi/cdef/*.h`` are parsed by cffi *and* included by the C compiler, so both see the
same layouts and no header of the host's kernel takes part. The C files of ``uapi/native/`` join the same
translation unit. Types that are nameless in the kernel's headers carry a tag, the path to the member with
``__`` between its parts (``kvm_run__io``): cffi cannot ask the compiler about a nameless type's layout.

``python -I -m kvmpy.build`` builds in place, with cffi and setuptools alone; the wheel calls :func:`build`.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import cffi

UAPI = Path(__file__).resolve().parent / "uapi"
MODULE = "kvmpy.uapi._native"
TARGET = "_native.abi3.so"
# In the order in which cffi and the C compiler read them.
DECLARATIONS = (
    "regs.h", "cpuid_msr.h", "events.h", "memory.h", "irq.h", "xen.h", "nested.h", "device.h", "run.h",
    "sev.h", "tdx.h", "para.h", "psp_sev.h", "userfaultfd.h",
)  # fmt: skip
PACKED_DECLARATIONS = ("psp_sev_packed.h",)


def ffibuilder() -> cffi.FFI:
    """Return the cffi builder that holds every declaration and the C source."""
    ffi = cffi.FFI()
    source = [
        "#ifndef _GNU_SOURCE",
        "#define _GNU_SOURCE",
        "#endif",
        "#include <stddef.h>",
        "#include <stdint.h>",
    ]
    native = sorted((UAPI / "native").glob("*.[ch]"))

    def declare(path: Path, packed: bool = False) -> None:
        ffi.cdef(path.read_text(), packed=packed)
        source.append(f'#include "{path.relative_to(UAPI)}"')

    for name in DECLARATIONS:
        declare(UAPI / "cdef" / name)
    source.append("#pragma pack(push, 1)")
    for name in PACKED_DECLARATIONS:
        declare(UAPI / "cdef" / name, packed=True)
    source.append("#pragma pack(pop)")
    for path in native:
        if path.suffix == ".h":
            declare(path)
    source += [f'#include "{path.relative_to(UAPI)}"' for path in native if path.suffix == ".c"]
    ffi.set_source(
        MODULE,
        "\n".join(source) + "\n",
        include_dirs=[str(UAPI)],
        extra_compile_args=["-O2", "-g", "-Wall", "-std=gnu11", "-fvisibility=hidden"],
        libraries=["rt", "pthread"],
        py_limited_api=True,
    )
    return ffi


def generate(ffi: cffi.FFI) -> list[Path]:
    """Write the generated files and return their paths; *ffi*'s declarations stand in for the extension.

    The extension includes some of them, so there is none yet: this process cannot load it any more.
    """
    stand_in = ModuleType(MODULE)
    vars(stand_in).update(ffi=ffi, lib=None)
    sys.modules[MODULE] = stand_in
    from kvmpy import gen

    return gen.write()


def build(directory: Path = UAPI) -> tuple[Path, list[Path]]:
    """Generate, compile the extension into *directory*; return it and the generated files.

    An older extension is replaced at once.
    """
    if shutil.which("gcc") is None and "CC" not in os.environ:
        raise SystemExit("kvmpy: no C compiler found; install one with: apt-get install gcc libc6-dev")
    ffi = ffibuilder()
    generated = generate(ffi)
    with tempfile.TemporaryDirectory(prefix="kvmpy-build-") as tmp:
        compiled = ffi.compile(tmpdir=tmp, target=f"{MODULE}.abi3.so")
        staged = directory / f".{TARGET}.{os.getpid()}"
        shutil.copy2(compiled, staged)
        os.replace(staged, directory / TARGET)
    return directory / TARGET, generated


if __name__ == "__main__":
    print(build()[0])

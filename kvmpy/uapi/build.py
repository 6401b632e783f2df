# SPDX-License-Identifier: Apache-2.0
"""Build the cffi extension ``kvmpy.uapi._native`` (API mode, limited API).

The declarations in ``cdef/*.h`` are parsed by cffi *and* included by the C compiler, so both see the same
layouts and no header of the host's kernel takes part. The C files of ``native/`` join the same translation
unit.

Run ``python -m kvmpy.uapi.build`` to build in place; the wheel build calls :func:`build`.
"""

from __future__ import annotations

import os
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

import cffi

HERE = Path(__file__).resolve().parent
MODULE = "kvmpy.uapi._native"
TARGET = "_native.abi3.so"


def _declaration_files() -> tuple[list[Path], list[Path]]:
    # cdef/__init__.py is plain data; importing it as a package would import the extension that is being
    # built.
    table = runpy.run_path(str(HERE / "cdef" / "__init__.py"))
    plain = [HERE / "cdef" / name for name in table["FILES"]]
    packed = [HERE / "cdef" / name for name in table["PACKED_FILES"]]
    return plain, packed


def _native_files(suffix: str) -> list[Path]:
    return sorted((HERE / "native").glob(f"*{suffix}"))


def ffibuilder() -> cffi.FFI:
    """Return the cffi builder that holds every declaration and the C source."""
    ffi = cffi.FFI()
    plain, packed = _declaration_files()
    source = [
        "#ifndef _GNU_SOURCE",
        "#define _GNU_SOURCE",
        "#endif",
        "#include <stddef.h>",
        "#include <stdint.h>",
    ]
    for path in plain:
        ffi.cdef(path.read_text())
        source.append(f'#include "{path.relative_to(HERE)}"')
    if packed:
        source.append("#pragma pack(push, 1)")
        for path in packed:
            ffi.cdef(path.read_text(), packed=True)
            source.append(f'#include "{path.relative_to(HERE)}"')
        source.append("#pragma pack(pop)")
    for path in _native_files(".h"):
        ffi.cdef(path.read_text())
        source.append(f'#include "{path.relative_to(HERE)}"')
    source += [f'#include "{path.relative_to(HERE)}"' for path in _native_files(".c")]
    ffi.set_source(
        MODULE,
        "\n".join(source) + "\n",
        include_dirs=[str(HERE)],
        extra_compile_args=["-O2", "-g", "-Wall", "-std=gnu11", "-fvisibility=hidden"],
        libraries=["rt", "pthread"],
        py_limited_api=True,
    )
    return ffi


def build(directory: Path = HERE) -> Path:
    """Compile the extension and place it in *directory*, replacing an older one atomically."""
    if shutil.which("gcc") is None and "CC" not in os.environ:
        raise SystemExit("kvmpy: no C compiler found; install one with: apt-get install gcc libc6-dev")
    with tempfile.TemporaryDirectory(prefix="kvmpy-build-") as tmp:
        made = Path(ffibuilder().compile(tmpdir=tmp, target=f"{MODULE}.abi3.so"))
        staged = directory / f".{TARGET}.{os.getpid()}"
        shutil.copy2(made, staged)
        os.replace(staged, directory / TARGET)
    return directory / TARGET


if __name__ == "__main__":
    print(build(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE))

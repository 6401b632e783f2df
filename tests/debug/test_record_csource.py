# SPDX-License-Identifier: Apache-2.0
"""What a C reproducer declares makes up for the kernel headers of this machine, whatever their version."""

from __future__ import annotations

import subprocess

import pytest

from kvmpy.debug.record.csource import NEW_STRUCTS, Vocabulary, initializer
from kvmpy.uapi import structs
from kvmpy.uapi.commands import SEV_PLATFORM_COMMANDS

STRUCTS = sorted(
    {*NEW_STRUCTS, *(command.struct for command in SEV_PLATFORM_COMMANDS.values() if command.struct)}
)


@pytest.mark.parametrize("name", STRUCTS)
def test_a_struct_compiles_with_any_headers(name: str) -> None:
    """Each field stands by its name, and the size is KVM's."""
    value = getattr(structs, name).from_bytes(b"\1" * getattr(structs, name).SIZE)
    words = Vocabulary()
    rows = initializer(value, words, lambda _: None, "\t")
    kind = words.struct(name)
    lines = ["#include <linux/kvm.h>", "#include <linux/psp-sev.h>", *words.definitions()]
    lines += [f"{kind} value = {{", *rows, "};", f'_Static_assert(sizeof value == {value.SIZE}, "size");']
    done = subprocess.run(
        ["gcc", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-xc", "-"],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert not done.stderr

#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Stands for modprobe and the kernel's modules: a tree as sysfs has it, loaded anew from a second one.

``fake_modules.py TREE -r MODULE`` and ``fake_modules.py TREE MODULE name=value...``: a module comes with the
values in TREE.boot, those of modprobe.d included, and leaves a line in TREE.log.
"""

import shutil
import sys
from pathlib import Path

ORIGINAL = {
    "kvm": {"halt_poll_ns": ("200000", 0o644), "tdp_mmu": ("Y", 0o444), "nx_huge_pages": ("N", 0o644)},
    "kvm_amd": {"npt": ("Y", 0o444), "nested": ("1", 0o444), "avic": ("N", 0o444)},
}


def make(tree: Path) -> None:
    """Make the modules as they are after a boot."""
    boot = tree.with_name(f"{tree.name}.boot")
    for module, parameters in ORIGINAL.items():
        folder = boot / module / "parameters"
        folder.mkdir(parents=True)
        (boot / module / "initstate").write_text("live\n")
        (boot / module / "holders").mkdir()
        for name, (value, mode) in parameters.items():
            (folder / name).write_text(f"{value}\n")
            (folder / name).chmod(mode)
    shutil.copytree(boot, tree)
    count(tree)


def count(tree: Path) -> None:
    """Write who holds whom."""
    if (tree / "kvm").is_dir():
        holders = ["kvm_amd"] if (tree / "kvm_amd").is_dir() else []
        for path in (tree / "kvm" / "holders").iterdir():
            path.unlink()
        for name in holders:
            (tree / "kvm" / "holders" / name).touch()
        (tree / "kvm" / "refcnt").write_text(f"{len(holders)}\n")
    if (tree / "kvm_amd").is_dir() and not (tree / "kvm_amd" / "refcnt").exists():
        (tree / "kvm_amd" / "refcnt").write_text("0\n")


def main(tree: Path, *words: str) -> int:
    """Be modprobe."""
    with tree.with_name(f"{tree.name}.log").open("a") as log:
        log.write(" ".join(words) + "\n")
    if words[0] == "-r":
        if (tree / words[1] / "refcnt").read_text() != "0\n":
            print(f"modprobe: FATAL: Module {words[1]} is in use.", file=sys.stderr)
            return 1
        shutil.rmtree(tree / words[1])
    else:
        shutil.copytree(tree.with_name(f"{tree.name}.boot") / words[0], tree / words[0])
        for name, _, value in (word.partition("=") for word in words[1:]):
            file = tree / words[0] / "parameters" / name
            if value == "bad":
                shutil.rmtree(tree / words[0])
                print("modprobe: ERROR: could not insert: Invalid argument", file=sys.stderr)
                return 1
            # avic stands for what the CPU does not have.
            if name != "avic":
                file.chmod(0o644)
                file.write_text(f"{value}\n")
                file.chmod(ORIGINAL[words[0]][name][1])
    count(tree)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))

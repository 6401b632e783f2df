# SPDX-License-Identifier: Apache-2.0
"""A program in place of a kernel that counts: a tree with KVM's folders, compiled for gcov, and run.

Its counters come out as files like those of /sys/kernel/debug/gcov.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from kvmpy.lab.coverage import kept, store
from kvmpy.lab.coverage.counters import BOOT, Counters

BUILD_ID = "5eed" * 10
SOURCES = {
    "arch/x86/kvm/x86.c": """\
#include "svm/sev.h"
#define FNAME(name) paging64_##name
#include "tmpl.h"
#undef FNAME
#define FNAME(name) paging32_##name
#include "tmpl.h"
int kvm_sev_ioctl(int number);
int __kvm_get_dirty_log(int slot);

static int set_boot_cpu(int number)
{
	return number + 1;
}

int kvm_arch_init(void)
{
	return set_boot_cpu(0);
}

int kvm_vm_ioctl(int number)
{
	if (number < 0)
		return -22 + paging64_walk(0) + paging32_walk(1);
	if (number > 100)
		return kvm_sev_ioctl(number) + asid_of(0);
	return __kvm_get_dirty_log(number);
}
""",
    "arch/x86/kvm/tmpl.h": """\
static int FNAME(walk)(int level)
{
	return level ?
		level - 1 : 0;
}
""",
    "arch/x86/kvm/svm/sev.c": """\
#include "sev.h"
/* softsev: sev-include 0123abcd */
#include <stdio.h>
static int softsev_hook(int number) { return number == 12345; }
/* softsev: end of sev-include */

static inline __attribute__((always_inline)) int doubled(int number)
{
	return 2 * number;
}

static int sev_launch(int number)
{
	int i, sum = 0;

	for (i = 0; i < number; i++)
		sum += asid_of(i);
	return doubled(sum);
}

static int never_called(int number)
{
	if (number)
		return -EINVAL;
	return -ENOTTY;
}

int kvm_sev_ioctl(int number)
{
/* softsev: sev-hook 0123abcd */
	if (softsev_hook(number))
		return 0;
/* softsev: end of sev-hook */
	switch (number) {
	case 101:
		return sev_launch(3);
	case 102:
		return never_called(number);
	default:
		return -EINVAL;
	}
}
""",
    "arch/x86/kvm/svm/sev.h": """\
#define EINVAL 22
#define ENOTTY 25
static inline int asid_of(int number)
{
	return number & 1 ?
		number : -number;
}
""",
    "arch/x86/kvm/svm/softsev_run.c": "int softsev_run(void)\n{\n\treturn 1;\n}\n",
    "virt/kvm/kvm_main.c": """\
int __kvm_get_dirty_log(int slot)
{
	if (slot == 7)
		return -1;
	return 0;
}
""",
    "lib/main.c": """\
int atoi(const char *);
int kvm_arch_init(void);
int kvm_vm_ioctl(int);
int main(int argc, char **argv)
{
	if (argc == 1)
		return kvm_arch_init() * 0;
	for (int i = 1; i < argc; i++)
		kvm_vm_ioctl(atoi(argv[i]));
	return 0;
}
""",
}


class CountedProgram:
    """The tree in *folder*, compiled; *sources* are its files."""

    def __init__(self, folder: Path, sources: dict[str, str] | None = None) -> None:
        self.tree, self.build, self._debug = folder / "linux", folder / "build", folder / "debug"
        objects = []
        for name, text in (sources or SOURCES).items():
            (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
            (self.tree / name).write_text(text)
        for name in (name for name in sources or SOURCES if name.endswith(".c")):
            source = self.tree / name
            target = self.build / name.replace(".c", ".o")
            target.parent.mkdir(parents=True, exist_ok=True)
            flags = [] if name.startswith("lib/") else ["-fprofile-arcs", "-ftest-coverage"]
            self._run("gcc", "-O0", "-w", *flags, "-c", str(source), "-o", str(target))
            objects.append(str(target))
        self.program = self.build / "program"
        self._run("gcc", "-fprofile-arcs", *objects, "-o", str(self.program))
        kept.pack(self.tree, self.build, folder / kept.ARCHIVE)
        self.folder = folder

    def _run(self, *command: str) -> None:
        subprocess.run(command, check=True, cwd=self.build if self.build.exists() else None, timeout=60)

    def copy(self, *numbers: int) -> Path:
        """Run it, and return a folder like /sys/kernel/debug/gcov with what it counted."""
        for old in self.build.rglob("*.gcda"):
            old.unlink()
        self._run(str(self.program), *map(str, numbers))
        shutil.rmtree(self._debug, ignore_errors=True)
        for data in self.build.rglob("*.gcda"):
            target = self._debug / str(data.resolve()).lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(data, target)
        (self._debug / "reset").touch()
        return self._debug

    def coverage(self, folder: Path, build_id: str = BUILD_ID) -> Path:
        """Make *folder* one for coverage of this kernel."""
        store._fill(folder, self.folder / kept.ARCHIVE, store.Facts("6.6.6-test", "6.6.6", build_id))
        return folder

    def add(self, folder: Path, suite: str, tests: dict[str, tuple[int, ...]]) -> None:
        """Add a run to *folder*: the boot, and each test with the numbers that it runs the program with."""
        writer = store.Writer(folder, suite)
        for test, numbers in {BOOT: (), **tests}.items():
            counters = Counters(self.copy(*numbers))
            writer.objects(counters.names)
            writer.add(test, 0.5, counters.take())
            counters.close()
        assert not writer.failure

# SPDX-License-Identifier: Apache-2.0
"""``kvmpy lab run --source``: a tree is built, booted and judged, for people and for ``git bisect run``."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmpy.cli import lab_run
from kvmpy.lab import build, kernels, places, tools
from kvmpy.lab.bisect import Ended, judge
from kvmpy.lab.errors import BuildError, LabError
from kvmpy.lab.kernels import Kernel
from kvmpy.lab.softsev import HookError
from tests.lab.conftest import FAKE, make_image

ROOT = Path(__file__).resolve().parents[2]
PANIC = "---[ cut here ]---\nKernel panic - not syncing: for a test\n"
PASSED: list[list[object]] = [["test", "test_a", "passed"], ["test", "test_b", "passed"]]
PLANS: dict[str, list[list[list[object]]]] = {
    "good": [[*PASSED, ["end"]]],
    "failing": [[["test", "test_a", "passed"], ["test", "test_b", "failed"], ["end"]]],
    "skipping": [[["test", "test_a", "skipped"], ["test", "test_b", "skipped"], ["end"]]],
    "dying": [
        [["test", "test_a", "passed"], ["start", "test_b"], ["console", PANIC], ["die", 0]],
        [["end"]],
    ],
    "dead": [[["silent"], ["console", PANIC], ["die", 0]]],
    "hanging": [[["test", "test_a", "passed"], ["start", "test_b"], ["hang"]]],
    "unstarted": [[["silent"], ["die", 1]]],
    "lacking": [[["machine", {"parameters": {"kvm.no_such": None}}, ""], ["end"]]],
}
MAKEFILE = """
tinyconfig:
\t@echo CONFIG_A=n > $(O)/.config
olddefconfig:
\t@$(if $(wildcard drops),sed -i 's/CONFIG_A=y/CONFIG_A=n/' $(O)/.config,true)
bzImage:
\t@$(if $(wildcard broken),echo 'x.c:1:2: error: broken on purpose'; false,true)
\t@$(if $(wildcard full),echo 'x.c: fatal error: cannot write: No space left on device'; false,true)
\t@$(if $(wildcard endless),sleep 100,true)
\t@mkdir -p $(O)/arch/x86/boot && cp image $(O)/arch/x86/boot/bzImage
"""
DRIVER = """
import sys
from pathlib import Path
from kvmpy.lab import places, tools
need = tools.need
places.fragment = lambda: Path(sys.argv[1])
tools.need = lambda wanted, purpose: need(wanted, purpose) if wanted == tools.RUN else None
from kvmpy.cli.main import main
main(sys.argv[2:], prog_name="kvmpy")
"""
# What is planned for a kernel is the last line of its image.
QEMU = """#!/bin/sh
for word; do
	[ "$last" = -kernel ] && image=$word
	last=$word
done
folder=$(mktemp -d "$PLANS/XXXXXX")
cp "$PLANS/$(tail -n 1 "$image").json" "$folder/plan.json"
FAKE_QEMU_PLAN=$folder/plan.json FAKE_QEMU_TESTS=2 exec "$PYTHON" "$FAKE" "$@"
"""


class Tree:
    """A folder that looks like a kernel tree, tests beside it, and a QEMU that knows what comes of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "tree"
        (self.root / "arch" / "x86").mkdir(parents=True)
        (self.root / "Kbuild").touch()
        (self.root / "Makefile").write_text(MAKEFILE)
        (folder / "selftests" / "area").mkdir(parents=True)
        tests = "".join(f"def test_{name}():\n    raise RuntimeError\n" for name in "ab")
        (folder / "selftests" / "area" / "test_a.py").write_text(tests)
        (folder / "fragment").write_text("CONFIG_A=y\n")
        (folder / "plans").mkdir()
        for name, plan in PLANS.items():
            (folder / "plans" / f"{name}.json").write_text(json.dumps(plan))
        (folder / "bin").mkdir()
        self.qemu = folder / "bin" / tools.QEMU
        self.qemu.write_text(QEMU)
        self.qemu.chmod(0o755)
        self.becomes("good")

    def becomes(self, plan: str) -> None:
        """Let the tree's kernel do what *plan* says."""
        make_image(self.root / "image", "9.1.0-mine", f"\n{plan}\n".encode())

    def command(self, *args: str) -> list[str]:
        driver = self.folder / "driver.py"
        driver.write_text(DRIVER)
        fixed = ["lab", "run", "--source", str(self.root), "--no-soft-sev", "--accel", "tcg", "--fresh-boot"]
        return [sys.executable, str(driver), str(self.folder / "fragment"), *fixed, "-n", "1", *args]

    def environment(self) -> dict[str, str]:
        own = {"PLANS": str(self.folder / "plans"), "FAKE": str(FAKE), "PYTHON": sys.executable}
        return (
            os.environ
            | own
            | {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        )

    def run(self, *args: str) -> tuple[int, str]:
        done = subprocess.run(
            self.command(*args, *([] if args else ["selftests"])),
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=110,
            check=False,
        )
        return done.returncode, done.stdout


@pytest.fixture
def tree(tmp_path: Path, warm: Path) -> Tree:
    return Tree(tmp_path)


# ---- statuses

ENDINGS = {
    Ended(0, begun=True, passed=True): 0,
    Ended(0, begun=True): 125,
    Ended(1, begun=True, passed=True, bad=True): 1,
    Ended(1, begun=True, passed=True): 1,  # the test process grew with every test
    Ended(2, begun=True, passed=True): 130,
    Ended(2, begun=True, bad=True): 130,
    Ended(2, begun=True, bad=True, stopped=True): 1,
    Ended(2, begun=True, stopped=True): 130,
    Ended(3, kernel_failed=True): 125,
    Ended(3): 131,
    Ended(3, begun=True, bad=True): 1,
    Ended(3, begun=True, passed=True): 131,  # a report could not be written
    Ended(3, begun=True, kernel_failed=True, passed=True): 131,
    Ended(4): 132,
    Ended(4, kernel_failed=True): 125,
    Ended(5): 133,
}


@pytest.mark.parametrize("ended", ENDINGS)
def test_every_end_has_its_status(ended: Ended) -> None:
    status, words = judge(ended)
    assert status == ENDINGS[ended]
    assert words


@pytest.mark.parametrize(
    ("plan", "status", "words"),
    [
        ("good", 0, "good: what ran passed"),
        ("failing", 1, "bad: a test failed or was lost"),
        ("dying", 1, "bad: a test failed or was lost"),
        ("skipping", 125, "cannot be tested: no test passed, and none failed"),
        ("dead", 125, "cannot be tested: its kernel does not reach the tests"),
        ("unstarted", 131, "not judged: something else went wrong"),
    ],
)
def test_what_becomes_of_the_kernel(tree: Tree, plan: str, status: int, words: str) -> None:
    before = sorted(tree.root.rglob("*"))
    tree.becomes(plan)
    code, text = tree.run("selftests", "--json", "out.json")
    assert code == status, text
    assert f"kvmpy lab: {tree.root}: {words}\n" in text
    assert sorted(tree.root.rglob("*")) == before
    # Nobody else boots it.
    assert kernels.cached() == []
    report = json.loads((tree.folder / "out.json").read_text())
    assert report["host"]["kernel"].startswith("9." if plan in ("dead", "unstarted") else "9.9.9")


@pytest.mark.parametrize(
    ("flaw", "status", "words"),
    [
        ("broken", 125, "x.c:1:2: error: broken on purpose"),
        ("drops", 125, "the configuration lost CONFIG_A"),
        ("full", 131, "No space left on device"),
    ],
)
def test_a_tree_that_makes_no_kernel(tree: Tree, flaw: str, status: int, words: str) -> None:
    (tree.root / flaw).touch()
    code, text = tree.run()
    assert code == status, text
    assert words in text
    assert ("cannot be tested: it does not build" in text) is (status == 125)
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("args", "status"),
    [
        (("selftests", "-k", "nothing_like_that"), 133),
        (("nowhere/test_x.py",), 132),
        (("selftests", "--cpus", "many"), 132),
        (("selftests", "--no-such-option"), 132),
        (("selftests", "--kernel", "7.2"), 132),
        (("selftests", "--matrix", "7.2"), 132),
        (("selftests", "--build"), 132),
        (("selftests", "--", "--no-such-option"), 132),
        (("selftests/area/test_a.py::test_none",), 133),
        (("selftests", "--json", "/proc/none/out.json"), 131),
    ],
)
def test_what_is_not_the_tree_s_fault_stops_git(tree: Tree, args: tuple[str, ...], status: int) -> None:
    code, text = tree.run(*args)
    assert code == status, text


def test_a_kernel_without_the_parameter_is_skipped(tree: Tree) -> None:
    tree.becomes("lacking")
    code, text = tree.run("selftests", "--param", "kvm.no_such=1")
    assert (code, "has no parameter kvm.no_such" in text) == (125, True), text


def test_no_tree_and_no_qemu_stop_git(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.qemu.unlink()
    tools_there = tree.folder / "bin"
    for name in ("make", "sed", "cp", "mkdir", "nice", "sh", "echo", "false", "true"):
        (tools_there / name).symlink_to(shutil.which(name) or "/nonexistent")
    monkeypatch.setenv("PATH", str(tools_there))
    code, text = tree.run()
    assert (code, "needs qemu-system-x86_64" in text) == (131, True), text
    (tree.root / "Kbuild").unlink()
    code, text = tree.run()
    assert (code, "is not a Linux source tree" in text) == (131, True), text


@pytest.mark.parametrize(
    ("number", "during", "status"),
    [
        (signal.SIGINT, "compiling", 130),
        (signal.SIGTERM, "compiling", 143),
        (signal.SIGHUP, "compiling", 129),
        (signal.SIGINT, "test_a.py", 130),
        (signal.SIGTERM, "test_a.py", 130),
    ],
)
def test_who_interrupts_stops_git(tree: Tree, number: signal.Signals, during: str, status: int) -> None:
    tree.becomes("hanging")
    if during == "compiling":
        (tree.root / "endless").touch()
    with subprocess.Popen(
        tree.command("selftests", "--verbose"),
        cwd=tree.folder,
        env=tree.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as child:
        assert child.stdout is not None
        text = ""
        while during not in text:
            line = child.stdout.read(1)
            assert line, text
            text += line
        child.send_signal(number)
        rest, _ = child.communicate(timeout=60)
    assert child.returncode == status, text + rest


def test_a_history_is_bisected(tree: Tree) -> None:
    """Of nine commits one breaks the tests and another does not build; git names the first."""

    def git(*args: str) -> str:
        own = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-C", str(tree.root)]
        done = subprocess.run(
            ["git", *own, *args],
            env=tree.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=110,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    git("init", "-q", "-b", "main")
    for number in range(9):
        tree.becomes("good" if number < 5 else "failing")
        (tree.root / "number").write_text(str(number))
        if number == 2:
            (tree.root / "broken").touch()
        else:
            (tree.root / "broken").unlink(missing_ok=True)
        git("add", "-A")
        git("commit", "-q", "-m", f"number {number}")
    git("bisect", "start", "main", "main~8")
    # The tests are not in the tree.
    command = " ".join(tree.command("selftests"))
    script = tree.folder / "run.sh"
    script.write_text(f"#!/bin/sh\ncd {tree.folder} && exec {command}\n")
    text = git("bisect", "run", "sh", str(script))
    assert f"{git('rev-parse', 'main~3').strip()} is the first bad commit" in text, text
    assert "number 5" in text
    assert git("status", "--porcelain") == ""


# ---- with and without the software AMD-SP


@pytest.mark.parametrize(
    ("error", "wanted", "built"),
    [
        (None, None, [True]),
        (None, False, [False]),
        (HookError("hook kvm-vmrun fits nowhere"), None, [True, False]),
        (HookError("hook kvm-vmrun fits nowhere"), True, [True]),
        (
            BuildError("the build failed; the first error is:\nsvm/softsev_run.c:1: error: x"),
            None,
            [True, False],
        ),
        (
            BuildError("the build failed; the first error is:\n/tree-1-softsev/mm/x.c:1: error: x"),
            None,
            [True],
        ),
        (LabError("no space"), None, [True]),
    ],
)
def test_the_software_amd_sp_is_left_out_where_it_does_not_fit(
    error: LabError | None, wanted: bool | None, built: list[bool], image: Path
) -> None:
    tried: list[bool] = []

    def make(soft_sev: bool) -> Kernel:
        tried.append(soft_sev)
        if soft_sev and error is not None:
            raise error
        return kernels.loose(image, "a test", soft_sev=soft_sev)

    fits: Callable[[], Kernel] = lambda: lab_run._as_it_fits(wanted, make)  # noqa: E731
    if error is not None and built == [True]:
        with pytest.raises(type(error)):
            fits()
    else:
        assert fits().soft_sev is built[-1]
    assert tried == built


def test_a_kernel_apart_is_a_copy(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next build of the tree does not change what still runs."""
    monkeypatch.setattr(places, "fragment", lambda: tree.folder / "fragment")
    monkeypatch.setattr(tools, "need", lambda *_: None)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    first = build.from_source(tree.root, lambda _: None, apart=tmp_path / "one")
    tree.becomes("failing")
    second = build.from_source(tree.root, lambda _: None, apart=tmp_path / "two")
    assert first.image.read_bytes().endswith(b"good\n")
    assert second.image.read_bytes().endswith(b"failing\n")
    assert first.release == "9.1.0-mine"

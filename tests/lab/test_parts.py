# SPDX-License-Identifier: Apache-2.0
"""Configurations, images, the cache and its lock, apt's arguments, missing tools, builds of a fake tree."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kvmpy.cli import lab as cli
from kvmpy.cli import lab_run
from kvmpy.lab import build, debian, kconfig, kernels, matrix, places, qemu, softsev, tools
from kvmpy.lab.coverage import kept
from kvmpy.lab.errors import LabError
from kvmpy.lab.root import Root
from kvmpy.testing.option_table import defaults, mebibytes
from kvmpy.testing.table import plain_console
from tests.lab.conftest import make_image


def test_a_lost_option_is_named_with_both_values() -> None:
    wanted = {"CONFIG_A": "y", "CONFIG_B": "y", "CONFIG_C": "n", "CONFIG_D": "16"}
    final = kconfig.parse("CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_D=8\n")
    assert kconfig.lost(wanted, final) == ["CONFIG_B (wanted y, got n)", "CONFIG_D (wanted 16, got 8)"]


def test_merge_replaces_both_spellings() -> None:
    merged = kconfig.merge(
        "CONFIG_A=n\n# CONFIG_B is not set\nCONFIG_AB=y\n", {"CONFIG_A": "y", "CONFIG_B": "n"}
    )
    assert merged == "CONFIG_AB=y\nCONFIG_A=y\n# CONFIG_B is not set\n"


def test_the_shipped_fragment_has_what_the_lab_is_for() -> None:
    options = kconfig.parse(places.fragment().read_text())
    for name in ("KVM_AMD", "KVM_SW_PROTECTED_VM", "9P_FS", "VIRTIO_CONSOLE", "NET_9P_VIRTIO"):
        assert options[f"CONFIG_{name}"] == "y"


@pytest.mark.parametrize("data", [b"", b"\x7fELF" + bytes(4096), bytes(4096)])
def test_what_is_no_image_is_refused(tmp_path: Path, cache: Path, data: bytes) -> None:
    file = tmp_path / "vmlinux"
    file.write_bytes(data)
    with pytest.raises(LabError, match="is not a bzImage"):
        build.from_image(file)
    assert kernels.cached() == []


def test_the_cache_finds_by_name_and_release(tmp_path: Path, cache: Path) -> None:
    old = kernels.register(make_image(tmp_path / "a", "6.12.9"), "file a")
    new = kernels.register(make_image(tmp_path / "b", "7.2.13"), "file b")
    assert [kernel.release for kernel in kernels.cached()] == ["7.2.13", "6.12.9"]
    assert kernels.find().name == new.name
    assert kernels.find("6.12").name == old.name
    assert kernels.find(old.name).image.read_bytes() == (tmp_path / "a").read_bytes()
    with pytest.raises(LabError, match=r"no lab kernel 6\.1\b"):
        kernels.find("6.1")
    kernels.remove(old)
    assert [kernel.name for kernel in kernels.cached()] == [new.name]
    assert [path.name for path in (cache / "kernels").iterdir()] == [new.name]


def test_the_same_kernel_again_replaces_its_entry(image: Path, cache: Path) -> None:
    kernels.register(image, "first")
    again = kernels.register(image, "second")
    assert [kernel.origin for kernel in kernels.cached()] == ["second"]
    assert [path.name for path in (cache / "kernels").iterdir()] == [again.name]


def test_an_empty_cache_says_how_to_fill_it(cache: Path) -> None:
    with pytest.raises(LabError, match="kvmpy lab build"):
        kernels.find()


HOLDER = """
import sys
from kvmpy.lab.kernels import build_lock
with build_lock(print):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_builds_do_not_collide(cache: Path) -> None:
    said: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LabError, match="has held"), kernels.build_lock(said.append, patience=0.0):
            pytest.fail("two builds at once")
        holder.communicate(timeout=60)
    assert said == [f"another lab build is running (pid {holder.pid}): waiting"]
    with kernels.build_lock(said.append, patience=0.0) as waited, (cache / "lock").open() as other:
        assert not waited
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_apt_keeps_everything_in_its_own_folder(tmp_path: Path) -> None:
    values = dict(word.split("=", 1) for word in debian.apt_options(tmp_path)[1::2])
    assert values["Dir::Etc::sourceparts"] == "/dev/null"
    for key in (
        "Dir::Etc::sourcelist",
        "Dir::State",
        "Dir::State::Lists",
        "Dir::State::status",
        "Dir::Cache",
    ):
        assert Path(values[key]).is_relative_to(tmp_path)


def test_the_source_line_is_verified_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = tmp_path / "keys.gpg"
    with pytest.raises(LabError, match="debian-archive-keyring"):
        debian.source_line("sid", keys)
    keys.touch()
    monkeypatch.setenv("KVMPY_DEBIAN_MIRROR", "http://mirror.example/debian")
    assert (
        debian.source_line("sid", keys) == f"deb [signed-by={keys}] http://mirror.example/debian sid main\n"
    )
    with pytest.raises(LabError, match="is not a Debian suite"):
        debian.source_line("sid main\ndeb http://evil.example", keys)


def test_the_newest_source_package() -> None:
    answer = "linux-source-6.9 - a\nlinux-source-6.12 - b\nlinux-source - meta\nlinux-source-6.1 - c\n"
    assert debian.newest(answer) == "linux-source-6.12"
    assert debian.newest("linux-source - meta\n") is None


def test_a_package_as_apt_describes_it() -> None:
    text = "Package: linux-source-7.2\nVersion: 7.2.13-1\nFilename: pool/x/l_7.deb\nSize: 12\n"
    text += "SHA256: ab\n\nPackage: b\n"
    assert debian.parse_package(text) == debian.Package("linux-source-7.2", "7.2.13-1", "l_7.deb", 12, "ab")
    with pytest.raises(LabError, match="SHA256"):
        debian.parse_package(text.replace("SHA256", "MD5"))


def test_a_download_that_is_there_is_verified_not_fetched(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(debian, "source_line", lambda _: "")
    folder = cache / "downloads"
    folder.mkdir(parents=True)
    (folder / "x.deb").write_bytes(b"content")
    package = debian.Package("x", "1", "x.deb", 7, hashlib.sha256(b"content").hexdigest())
    monkeypatch.setenv("PATH", "")
    assert debian.Suite("sid").download(package, lambda _: None) == folder / "x.deb"


def test_missing_tools_come_with_a_command() -> None:
    with pytest.raises(LabError, match=r"needs flex, gelf.h[\s\S]*install .*flex.*elf"):
        tools.need(tools.BUILD, "a build", lambda tool: tool.name not in ("flex", "gelf.h"))


def test_too_little_disk_is_named(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"a build needs 1099511627776 MiB, .* has \d+ MiB free"):
        places.need_space(tmp_path / "not" / "there", 1 << 40, "a build")


def test_the_first_error_of_a_build() -> None:
    log = "  CC a.o\nb.c:3:1: error: no such thing\n   3 | oops\nc.c:1: error: later\n"
    log += "make[2]: *** [b.o] Error 1\n"
    assert build.first_error(log).splitlines()[0] == "b.c:3:1: error: no such thing"
    assert build.first_error("x\nmake: *** No rule\n").startswith("make: ***")


@pytest.mark.parametrize(
    "line",
    [
        "x.s:12: Error: no such instruction: `frobnicate'",
        'ERROR: modpost: "kvm_frob" [arch/x86/kvm/kvm.ko] undefined!',
        "ld: b.o:(.data+0x0): multiple definition of `frob'; a.o:(.data+0x0): first defined here",
        "Makefile:7: *** missing separator.  Stop.",
    ],
)
def test_the_cause_is_not_what_make_says_of_its_targets(line: str) -> None:
    log = f"  CC a.o\n{line}\nmake[2]: *** [scripts/Makefile.build:1: a.o] Error 2\nmake: *** [sub] Error 2\n"
    assert build.first_error(log).splitlines()[0] == line


SUB_MAKEFILE = """
define newline


endef
$(error ERROR ***\\
$(newline)found 1 unwanted occurrences of EXPORT_SYMBOL:\\
$(newline)  virt/kvm/kvm_main.c:EXPORT_SYMBOL(frob)\\
$(newline)in directories:\\
$(newline)  arch/x86/kvm\\
$(newline)  virt/kvm\\
$(newline)Use EXPORT_SYMBOL_FOR_KVM_INTERNAL, not EXPORT_SYMBOL)
all:
"""


def test_an_error_of_a_makefile_is_shown_as_a_whole(tmp_path: Path) -> None:
    """arch/x86/kvm/Makefile stops by $(error), lines before what the makes above say of that."""
    (tmp_path / "Makefile").write_text("all:\n\t$(MAKE) -f middle\n")
    (tmp_path / "middle").write_text("all:\n\t$(MAKE) -f sub\n")
    (tmp_path / "sub").write_text(SUB_MAKEFILE)
    log = subprocess.run(
        ["make", "-C", str(tmp_path)],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
        timeout=60,
    ).stdout
    shown = build.first_error(log).splitlines()
    assert "*** ERROR ***" in shown[0]
    assert shown[1].startswith("found 1 unwanted occurrences of EXPORT_SYMBOL")
    assert shown[-1] == "Use EXPORT_SYMBOL_FOR_KVM_INTERNAL, not EXPORT_SYMBOL.  Stop."


MAKEFILE = """
tinyconfig:
\t@echo CONFIG_A=n > $(O)/.config
olddefconfig:
\t@$(if $(wildcard drops),sed -i 's/CONFIG_B=y/CONFIG_B=n/' $(O)/.config,true)
bzImage:
\t@$(if $(wildcard broken),echo 'x.c:1:2: error: broken on purpose'; false,true)
\t@mkdir -p $(O)/arch/x86/boot && cp image $(O)/arch/x86/boot/bzImage
"""


@pytest.fixture
def tree(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a kernel tree, and an own fragment."""
    root = tmp_path / "tree"
    (root / "arch" / "x86").mkdir(parents=True)
    (root / "Kbuild").touch()
    (root / "Makefile").write_text(MAKEFILE)
    make_image(root / "image", "9.1.0-mine")
    fragment = tmp_path / "fragment"
    fragment.write_text("CONFIG_A=y\nCONFIG_B=y\n")
    monkeypatch.setattr(places, "fragment", lambda: fragment)
    monkeypatch.setattr(tools, "need", lambda *_: None)
    return root


def test_a_tree_is_built_outside_of_it(tree: Path) -> None:
    before = sorted(tree.rglob("*"))
    kernel = build.from_source(tree, lambda _: None)
    assert kernel.release == "9.1.0-mine"
    assert kconfig.parse((kernel.folder / "config").read_text()) == {"CONFIG_A": "y", "CONFIG_B": "y"}
    assert sorted(tree.rglob("*")) == before


COUNTING = """
FOLDERS := mm arch/x86/kernel arch/x86/kvm arch/x86/kvm/svm
bzImage:
\t@mkdir -p $(O)/arch/x86/boot $(addprefix $(O)/,$(FOLDERS))
\t@cp image $(O)/arch/x86/boot/bzImage
\t@$(foreach obj,$(FOLDERS),$(if $(GCOV_PROFILE),touch $(O)/$(obj)/x.gcno;))
"""


@pytest.fixture
def counting(tree: Path) -> Path:
    """A tree in which make's variable asks KVM's folders for counters, and no other one."""
    (tree / "Makefile").write_text(MAKEFILE.partition("bzImage:")[0] + COUNTING)
    (tree / "arch/x86/kvm").mkdir()
    (tree / "arch/x86/kvm/x86.c").write_text("int x;\n")
    return tree


def test_a_kernel_that_counts(counting: Path) -> None:
    plain = build.from_source(counting, lambda _: None)
    kernel = build.from_source(counting, lambda _: None, coverage=True)
    assert plain.coverage is None
    assert kernel.coverage is not None
    archive = kept.Kept(kernel.coverage)
    assert archive.objects == ("arch/x86/kvm/svm/x", "arch/x86/kvm/x")
    assert archive.source("arch/x86/kvm/x86.c") == "int x;\n"
    # It boots when it is named, or for coverage.
    assert kernels.find().name == plain.name
    assert kernels.find(coverage=True).name == kernel.name
    [folder] = [path for path in (places.cache() / "build").iterdir() if list(path.rglob("*.gcno"))]
    assert not (folder / "mm" / "x.gcno").exists()
    assert kernels.find("9.1", coverage=True).name == kernel.name
    with pytest.raises(LabError, match=r"no lab kernel 8\.0 that counts what KVM executes"):
        kernels.find("8.0", coverage=True)
    with pytest.raises(LabError, match=f"{plain.name} that counts"):
        kernels.find(plain.name, coverage=True)


def test_a_compiler_that_does_not_count(tree: Path) -> None:
    with pytest.raises(LabError, match="left no notes"):
        build.from_source(tree, lambda _: None, coverage=True)


def test_the_build_id_is_the_linkers(tmp_path: Path) -> None:
    (tmp_path / "a.c").write_text("int main(void) { return 0; }")
    flags = ["-Wl,--build-id=0xc0ffee", "-o", str(tmp_path / "vmlinux")]
    subprocess.run(["gcc", str(tmp_path / "a.c"), *flags], check=True, timeout=60)
    assert build.build_id(tmp_path / "vmlinux") == "c0ffee"


def test_a_second_build_of_a_tree_that_is_changed(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the software AMD-SP changes and brings keeps its time where it comes out the same."""
    hooks = tmp_path / "hooks"
    (hooks / "new").mkdir(parents=True)
    (hooks / "new" / "x.c").write_text("1")
    (hooks / "hooks.toml").write_text(
        '[[copy]]\nfrom = "new"\nto = "new"\n'
        '[[hook]]\nname = "one"\nfile = "a.c"\nplace = "append"\ntext = "more"\n'
    )
    (tree / "a.c").write_text("int a;\n")
    monkeypatch.setattr(softsev, "FOLDER", hooks)

    def times() -> tuple[int, int]:
        build.from_source(tree, lambda _: None, soft_sev=True)
        [copy] = (places.cache() / "trees").iterdir()
        return tuple((copy / name).stat().st_mtime_ns for name in ("a.c", "new/x.c"))  # type: ignore[return-value]

    first = times()
    assert times() == first
    (hooks / "new" / "x.c").write_text("2")
    hooked, brought = times()
    assert (hooked, brought > first[1]) == (first[0], True)
    (tree / "a.c").write_text("int b;\n")
    assert times()[0] > first[0]


@pytest.mark.parametrize(
    ("flaw", "words"),
    [
        ("drops", r"lost CONFIG_B \(wanted y, got n\)"),
        ("broken", r"first error is:\nx\.c:1:2: error: broken on purpose"),
    ],
)
def test_a_tree_that_makes_no_kernel(tree: Path, flaw: str, words: str) -> None:
    (tree / flaw).touch()
    with pytest.raises(LabError, match=words):
        build.from_source(tree, lambda _: None)
    assert kernels.cached() == []


def test_options_besides_the_lab_s(tree: Path, tmp_path: Path) -> None:
    """They override the lab's, are compiled apart, and make a kernel that is booted when it is asked for."""
    fragment = tmp_path / "mine.config"
    fragment.write_text("# CONFIG_A is not set\nCONFIG_C=y\n")
    debugging = build.from_source(tree, lambda _: None, extra=[fragment])
    wanted = {"CONFIG_A": "n", "CONFIG_B": "y", "CONFIG_C": "y"}
    assert kconfig.parse((debugging.folder / "config").read_text()) == wanted
    assert debugging.extra == "mine.config"
    assert kernels.find() == debugging
    assert build.present(soft_sev=False) is None

    plain = build.from_source(tree, lambda _: None)
    assert kconfig.parse((plain.folder / "config").read_text()) == {"CONFIG_A": "y", "CONFIG_B": "y"}
    assert kernels.find() == kernels.find("9.1") == build.present(soft_sev=False) == plain
    assert kernels.find(debugging.name) == debugging
    listed = CliRunner().invoke(cli.lab, ["list"]).output.splitlines()
    assert sorted(line.endswith(", with mine.config") for line in listed) == [False, True]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--config", "nothing.config"], "no file nothing.config"),
        (["--config", "kernel"], "no file kernel"),
        (["--config", "coverage"], "no file coverage"),
        (["--coverage", "--missing"], "not with --kernel or --missing"),
        (["--config", "empty"], "empty has no kernel option"),
        (["--config", "debug", "--missing"], "not with --kernel or --missing"),
        (["--config", "debug", "--kernel", "x"], "not with --kernel or --missing"),
    ],
)
def test_options_that_cannot_be(
    arguments: list[str], text: str, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").write_text("KASAN=y\n")
    source = [] if "--kernel" in arguments else ["--source", str(tree)]
    result = CliRunner().invoke(cli.lab, ["build", *source, *arguments])
    assert result.exit_code != 0
    assert text in result.output
    assert kernels.cached() == []


def test_kvmpy_s_own_options_have_a_name() -> None:
    """``debug`` is read from the lab's files, and takes away what rules KASAN out."""
    options = kconfig.parse(places.extra_fragment("debug").read_text())
    assert options["CONFIG_KASAN"] == "y"
    assert options["CONFIG_SLUB_TINY"] == "n"


def test_what_is_no_tree(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(LabError, match="not a Linux source tree"):
        build.from_source(tmp_path, lambda _: None)


def test_the_command_line_shares_read_only(image: Path, cache: Path, tmp_path: Path) -> None:
    options = qemu.Options(kernels.find(str(image)), cpus=3, memory=512)
    root = Root(tmp_path / "root", (Path("/usr"), Path("/opt/a,b")))
    words = qemu.command_line(options, tmp_path, root, qemu.Start(tmp_path / "initramfs"))
    shares = [words[index + 1] for index, word in enumerate(words) if word == "-fsdev"]
    paths = [share.split(",path=")[1].split(",security_model")[0] for share in shares]
    job = str(tmp_path / "job")
    # Those that a run has no folder for show one that it has anyway.
    assert paths == [job, "/usr", "/opt/a,,b", *[job] * (qemu.SHARES - 2)]
    assert all("readonly=on" in share for share in shares)
    assert words[words.index("-smp") + 1].split(",")[0] == "3"
    assert words[words.index("-m") + 1] == "512M"
    assert "-no-reboot" in words


@pytest.mark.parametrize(
    ("cpus", "memory", "nodes"),
    [
        (1, 512, []),
        (2, 512, [("256M", "0-0"), ("256M", "1-1")]),
        (3, 513, [("256M", "0-0"), ("257M", "1-2")]),
        (8, 4096, [("2048M", "0-3"), ("2048M", "4-7")]),
    ],
)
def test_two_cpus_are_two_numa_nodes(
    image: Path, cache: Path, tmp_path: Path, cpus: int, memory: int, nodes: list[tuple[str, str]]
) -> None:
    words = qemu.command_line(
        qemu.Options(kernels.find(str(image)), cpus, memory),
        tmp_path,
        Root(tmp_path, ()),
        qemu.Start(tmp_path / "initramfs"),
    )
    pairs = list(itertools.pairwise(words))
    backends = [value.split(",") for name, value in pairs if name == "-object"]
    assert backends == [
        ["memory-backend-ram", f"id=node{number}", f"size={size}"]
        for number, (size, _) in enumerate(nodes or [(f"{memory}M", "")])
    ]
    assert [value for name, value in pairs if name == "-numa"] == [
        f"node,nodeid={number},memdev=node{number},cpus={range_}" for number, (_, range_) in enumerate(nodes)
    ]


@pytest.mark.parametrize(("value", "works"), [("1", True), ("Y", True), ("0", False), ("N", False)])
def test_nested_virtualisation_is_looked_up(tmp_path: Path, value: str, works: bool) -> None:
    assert not qemu.nested_works(tmp_path)
    folder = tmp_path / "kvm_amd" / "parameters"
    folder.mkdir(parents=True)
    (folder / "nested").write_text(f"{value}\n")
    assert qemu.nested_works(tmp_path) is works


def test_the_excerpt_begins_with_the_trouble() -> None:
    text = "boring\n" * 100 + "BUG: kernel NULL pointer dereference\nCall Trace:\n f+0x1\n"
    assert qemu.excerpt(text).splitlines()[0].startswith("BUG: kernel NULL")
    assert qemu.excerpt("a\nb\n") == "a\nb"


@pytest.mark.parametrize(("text", "size"), [("512M", 512), ("4G", 4096), ("300", 300), ("2g", 2048)])
def test_sizes_of_memory(text: str, size: int) -> None:
    assert mebibytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "G", "4T", "-1G", "1.5G"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="no size such as"):
        mebibytes(text)


def test_a_matrix_shows_what_differs() -> None:
    one = {"tests": [{"id": "a", "verdict": "pass"}, {"id": "b", "verdict": "pass"}]}
    two = {"tests": [{"id": "a", "verdict": "pass"}, {"id": "b", "verdict": "lost"}]}
    merged = matrix.merge({"k1": one, "k2": two, "k3": {}})
    assert merged == {"a": {"k1": "pass", "k2": "pass"}, "b": {"k1": "pass", "k2": "lost"}}
    assert matrix.table(["k1", "k2"], merged).row_count == 1 + 5


def test_a_matrix_tells_the_cases_of_a_test_apart(capsys: pytest.CaptureFixture[str]) -> None:
    """What pytest puts into brackets is no markup, and no row of a pipe is cut."""
    cases = [f"sev/test_ghcb.py::test_pages_of_a_guest_request[snp-1048584-1052672-{name}]" for name in "ab"]
    plain_console().print(matrix.table(["k1", "k2"], {case: {"k1": "pass", "k2": "fail"} for case in cases}))
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "test_ghcb" in line]
    assert rows == [[case, "pass", "fail"] for case in cases]


def test_the_job_survives_any_text(tmp_path: Path) -> None:
    words = ["a b", "it's", "$HOME", '"x"', "\\"]
    job = qemu.Job(["printf", "%s\\n", *words], {"NAME": "it's $HOME"}, tmp_path, Root(tmp_path, ()))
    (tmp_path / "job.env").write_text(job.text())
    script = '. ./job.env; echo "$NAME"; "$@"'
    result = subprocess.run(
        ["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=True
    )
    assert result.stdout.splitlines() == ["it's $HOME", *words]


def test_the_mirror_is_the_machines_own(tmp_path: Path) -> None:
    parts = tmp_path / "sources.list.d"
    parts.mkdir()
    (tmp_path / "sources.list").write_text("# deb http://commented.example/debian sid main\n")
    (parts / "debian.sources").write_text("Types: deb\nURIs: http://mirror.example/debian/\nSuites: sid\n")
    assert debian.machine_mirror((tmp_path / "sources.list", parts)) == "http://mirror.example/debian"
    (parts / "debian.sources").unlink()
    with pytest.raises(LabError, match="KVMPY_DEBIAN_MIRROR"):
        debian.machine_mirror((tmp_path / "sources.list", parts))


def test_kernels_with_the_software_amd_sp_are_told_apart(image: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"software AMD-SP[\s\S]*kvmpy lab build --soft-sev"):
        kernels.find(soft_sev=True)
    soft = kernels.register(make_image(tmp_path / "new", "9.9.9"), "file new", soft_sev=True)
    assert soft.name.endswith("-softsev")
    assert kernels.find().name == soft.name  # better than none
    plain = kernels.register(image, "file")
    assert (kernels.find().name, kernels.find(soft_sev=True).name) == (plain.name, soft.name)


def test_parameters_of_modules(image: Path, cache: Path) -> None:
    values: dict[str, Any] = {**defaults("lab shell"), "kernel": str(image), "memory": 1024, "accel": "tcg"}
    parameters = ("kvm_amd.npt=0", "kvm.ignore_msrs=Y")
    options = lab_run.machine({**values, "parameters": parameters})
    append = qemu.command_line(options, Path("/x"), Root(Path("/y"), ()), qemu.Start(Path("/z")))
    words = append[append.index("-append") + 1]
    assert words.endswith(" kvm_amd.npt=0 kvm.ignore_msrs=Y")
    assert "no_timer_check" in words.split()
    args = lab_run.matrix_arguments((), {**defaults("lab run"), "parameters": parameters})
    assert args[args.index("--param") :][:4] == ["--param", parameters[0], "--param", parameters[1]]


@pytest.mark.parametrize("word", ["kvm_amd.npt", "kvm_amd.npt=0 init=/bin/sh", "-x", "a=b c", ""])
def test_what_is_no_parameter(word: str) -> None:
    result = CliRunner().invoke(cli.lab, ["shell", "--param", word])
    assert result.exit_code == 2
    assert "kvm_amd.npt=0" in result.output


@pytest.mark.parametrize("word", ["la57", "+", "+LA57", "-la57,+x", "+la57=1"])
def test_what_is_no_cpu_flag(word: str) -> None:
    result = CliRunner().invoke(cli.lab, ["shell", "--cpu", word])
    assert result.exit_code == 2
    assert "is not like +la57 or -vgif" in result.output

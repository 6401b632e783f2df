# SPDX-License-Identifier: Apache-2.0
"""``kvmpy abi``: the tables as JSON, and the comparison with kernel headers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kvmpy.cli.abi import abi
from kvmpy.uapi.abi import check
from kvmpy.uapi.constants import ALL
from kvmpy.uapi.headers import HeaderError, locate
from kvmpy.uapi.ioctls import IOCTLS
from kvmpy.uapi.structs import STRUCTS

Tree = Callable[..., Path]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(abi, arguments)


@pytest.fixture(scope="module")
def everything() -> dict[str, Any]:
    result = run("--json")
    assert result.exit_code == 0
    data: dict[str, Any] = json.loads(result.stdout)
    return data


def test_json_has_every_table(everything: dict[str, Any]) -> None:
    assert everything["ioctls"].keys() == IOCTLS.keys()
    assert everything["structs"].keys() == STRUCTS.keys()
    assert everything["constants"] == ALL
    assert everything["sev_commands"]["KVM_SEV_SNP_LAUNCH_UPDATE"]["id"] == 101


def test_json_shape_of_an_ioctl(everything: dict[str, Any]) -> None:
    assert everything["ioctls"]["KVM_RUN"] == {
        "nr": 44672,
        "fd": "vcpu",
        "struct": None,
        "cap": None,
        "arg": "none",
        "scalar": None,
        "also": {},
    }
    assert everything["ioctls"]["KVM_CREATE_GUEST_MEMFD"]["struct"] == "kvm_create_guest_memfd"
    assert everything["ioctls"]["KVM_CREATE_GUEST_MEMFD"]["cap"] == "KVM_CAP_GUEST_MEMFD"


def test_json_shape_of_a_struct(everything: dict[str, Any]) -> None:
    regs = everything["structs"]["kvm_regs"]
    assert regs["size"] == 144
    assert regs["fields"]["rax"] == [0, 8]
    assert regs["fields"]["rflags"] == [136, 8]
    assert everything["structs"]["kvm_cpuid2"]["fields"]["entries"] == [8, 0]
    assert everything["structs"]["kvm_irq_level"]["fields"] == {
        "irq": [0, 4],
        "status": [0, 4],
        "level": [4, 4],
    }
    assert everything["structs"]["sev_user_data_snp_config"]["bits"]["rsvd"] == [66, 30]


def test_json_constant(everything: dict[str, Any]) -> None:
    assert everything["constants"]["KVM_CAP_GUEST_MEMFD"] == 234


def test_table_for_people() -> None:
    result = run()
    assert result.exit_code == 0
    assert "KVM_SET_USER_MEMORY_REGION2" in result.stdout
    assert "kvm_userspace_memory_region2" in result.stdout
    assert "133 structs" in result.stdout


def test_show_one() -> None:
    result = run("show", "KVM_ENABLE_CAP", "kvm_irqchip", "KVM_SEV_INIT2")
    assert result.exit_code == 0
    assert "issued on: vcpu (KVM_CAP_ENABLE_CAP), vm (KVM_CAP_ENABLE_CAP_VM)" in result.stdout
    assert "struct kvm_irqchip: 520 bytes" in result.stdout
    assert "command of sev, es, snp: in, struct kvm_sev_init" in result.stdout


def test_show_of_an_unknown_name_tells_close_ones() -> None:
    result = run("show", "KVM_GET_REG")
    assert result.exit_code == 1
    assert "did you mean KVM_GET_REGS" in result.stderr


def test_json_in_the_wrong_place_is_an_error() -> None:
    result = run("--json", "show", "KVM_RUN")
    assert result.exit_code == 2
    assert "put --json after the command" in result.stderr


@pytest.mark.usefixtures("gcc")
class TestCheck:
    """Against small trees in which one thing differs."""

    def test_agreement(self, header_tree: Tree) -> None:
        report = check(header_tree())
        assert report.differences == []
        assert report.drift == []
        assert report.compared > 30
        assert "struct kvm_regs" in report.absent

    @pytest.mark.parametrize(
        ("change", "found"),
        [
            (("KVM_CAP_GUEST_MEMFD 234", "KVM_CAP_GUEST_MEMFD 235"), "constant KVM_CAP_GUEST_MEMFD: number"),
            (("_IO(KVMIO, 0x80)", "_IO(KVMIO, 0x81)"), "ioctl KVM_RUN: number 44672"),
            (("__u32 edx;", "__u32 edx; __u32 more;"), "struct kvm_cpuid_entry2: size 40"),
            (("__u64 addr; __u64 size;", "__u64 size; __u64 addr;"), "field kvm_enc_region.addr: offset 0"),
            (("KVM_SEV_INIT = 0", "KVM_SEV_INIT = 1"), "constant KVM_SEV_ES_INIT: number 1, headers 2"),
            (
                ("__u16 limit; __u16 padding[3]", "__u32 limit; __u16 padding[2]"),
                "field kvm_dtable.limit: size 2",
            ),
        ],
    )
    def test_a_planted_difference_is_found(
        self, header_tree: Tree, change: tuple[str, str], found: str
    ) -> None:
        tree = header_tree(change)
        assert any(found in str(each) for each in check(tree).differences)
        result = run("check", "--headers", str(tree))
        assert result.exit_code == 1
        assert found in result.stdout

    def test_a_moved_bit_field_is_found(self, header_tree: Tree) -> None:
        fields = (
            "__u64 reported_tcb; __u32 mask_chip_id:1; __u32 mask_chip_key:2; __u32 rsvd:29; __u8 rsvd1[52];"
        )
        report = check(header_tree(add=f"struct sev_user_data_snp_config {{ {fields} }};\n"))
        assert {each.name.rpartition(".")[2] for each in report.differences} == {"mask_chip_key", "rsvd"}
        assert report.differences[0].headers == (65, 2)

    def test_drift_is_told_apart(self, header_tree: Tree) -> None:
        tree = header_tree(
            ("__u32 edx;", "__u32 edx; __u32 brand_new;"),
            add="#define KVM_CAP_BRAND_NEW 999\n"
            "struct kvm_brand_new { __u64 x; };\n"
            "#define KVM_BRAND_NEW _IOW(KVMIO, 0xfe, struct kvm_brand_new)\n"
            "#define KVM_ELSEWHERE _IOW(KVMIO, 0xff, struct kvm_of_another_architecture)\n"
            "#define KVM_S390_NEW_THING _IO(KVMIO, 0xfd)\n",
        )
        report = check(tree)
        assert {(each.kind, each.name, each.value) for each in report.unexplained} == {
            ("constant", "KVM_CAP_BRAND_NEW", 999),
            ("struct", "kvm_brand_new", None),
            ("ioctl", "KVM_BRAND_NEW", 0x4008AEFE),
            ("ioctl", "KVM_ELSEWHERE", None),
            ("field", "kvm_cpuid_entry2.brand_new", None),
        }
        explained = [each for each in report.drift if each.reason]
        assert [(each.name, each.reason) for each in explained] == [("KVM_S390_NEW_THING", "s390 only")]

    def test_drift_alone_is_no_failure_unless_asked(self, header_tree: Tree) -> None:
        tree = str(header_tree(add="#define KVM_CAP_BRAND_NEW 999\n"))
        result = run("check", "--headers", tree)
        assert result.exit_code == 0
        assert "differences: none" in result.stdout
        assert "constant KVM_CAP_BRAND_NEW = 999" in result.stdout
        assert run("check", "--headers", tree, "--fail-on-drift").exit_code == 1

    def test_report_as_json(self, header_tree: Tree) -> None:
        result = run(
            "check", "--headers", str(header_tree(("KVM_CAP_IRQCHIP 0", "KVM_CAP_IRQCHIP 1"))), "--json"
        )
        assert result.exit_code == 1
        report = json.loads(result.stdout)
        assert report["differences"] == [
            {
                "kind": "constant",
                "name": "KVM_CAP_IRQCHIP",
                "what": "number",
                "kvmpy": 0,
                "headers": 1,
                "reason": "",
            }
        ]

    def test_what_grows_with_the_kernel_is_said(self, header_tree: Tree) -> None:
        report = check(header_tree(add="#define KVM_DEV_TYPE_MAX 11\n"))
        assert [each.reason for each in report.differences] == ["grows with the kernel"]

    def test_include_folder_and_unpacked_package_are_found(self, header_tree: Tree) -> None:
        tree = header_tree()
        assert check(tree / "include").differences == []
        package = tree / "package"
        (package / "usr").mkdir(parents=True)
        (tree / "include").rename(package / "usr" / "include")
        multiarch = package / "usr" / "include" / "x86_64-linux-gnu"
        multiarch.mkdir()
        (package / "usr" / "include" / "asm").rename(multiarch / "asm")
        assert check(package).differences == []
        shared = package / "usr" / "lib" / "linux" / "uapi" / "x86"
        shared.mkdir(parents=True)
        (multiarch / "asm").rename(shared / "asm")
        assert locate(package).includes[1] == shared
        assert check(package).compared > 30

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("#include <linux/missing.h>\n", "cannot be preprocessed"),
            ("struct kvm_broken { int x }\n", "cannot be parsed"),
        ],
    )
    def test_broken_headers(self, header_tree: Tree, text: str, message: str) -> None:
        result = run("check", "--headers", str(header_tree(add=text)))
        assert result.exit_code == 1
        assert message in result.stderr
        assert "Traceback" not in result.output

    def test_headers_that_do_not_compile(self, header_tree: Tree) -> None:
        tree = header_tree(add="struct kvm_twice { __u64 x; };\nstruct kvm_twice { __u64 x; };\n")
        with pytest.raises(HeaderError, match="probe does not compile"):
            check(tree)

    def test_headers_of_another_architecture(self, header_tree: Tree) -> None:
        tree = header_tree(
            (
                "struct kvm_dtable { __u64 base; __u16 limit; __u16 padding[3]; };",
                "struct kvm_regs { __u64 pc; };",
            )
        )
        with pytest.raises(HeaderError, match="another architecture"):
            check(tree)

    def test_missing_c_library(self, header_tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CC", "gcc -nostdinc")
        with pytest.raises(HeaderError, match="apt-get install libc6-dev"):
            check(header_tree())

    def test_the_host_s_own_headers(self) -> None:
        if not Path("/usr/include/linux/kvm.h").is_file():
            pytest.skip("no kernel headers installed (apt-get install linux-libc-dev)")
        report = check(Path("/usr"))
        assert report.compared > 1000
        assert not [each for each in report.differences if each.kind == "ioctl"]


def test_missing_directory(tmp_path: Path) -> None:
    result = run("check", "--headers", str(tmp_path / "nowhere"))
    assert result.exit_code == 1
    assert "nowhere: no such directory" in result.stderr


def test_directory_without_headers(tmp_path: Path) -> None:
    result = run("check", "--headers", str(tmp_path))
    assert result.exit_code == 1
    assert "no linux/kvm.h in it" in result.stderr


def test_headers_without_those_of_x86(header_tree: Tree) -> None:
    tree = header_tree()
    (tree / "include" / "asm" / "kvm.h").unlink()
    with pytest.raises(HeaderError, match=r"asm/kvm\.h of x86 is not"):
        locate(tree)


def test_kernel_source_tree_is_recognised(tmp_path: Path) -> None:
    source = tmp_path / "include" / "uapi" / "linux"
    source.mkdir(parents=True)
    (source / "kvm.h").write_text("")
    with pytest.raises(HeaderError, match="make headers_install"):
        locate(tmp_path)


def test_missing_compiler(header_tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(HeaderError, match=r"no C compiler \(no-such-compiler\).*apt-get install gcc"):
        check(header_tree())

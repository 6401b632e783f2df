# SPDX-License-Identifier: Apache-2.0
"""Configurations: kvmpy's own set, files of the user's, and what is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmpy.testing import configurations
from kvmpy.testing.configurations import Configuration, ConfigurationError, chosen, is_value, load

GOOD = """
[mine]
about = "all there is to say"
parameters = ["kvm_amd.npt=N", "no5lvl", "isolcpus=1-3"]
optional = ["kvm.lapic_timer_advance=N"]
cpu = ["+la57", "-vgif"]
cpus = 4
memory = "6G"
nodes = 2
soft-sev = false
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_everything_that_a_file_can_say(tmp_path: Path) -> None:
    known = load([write(tmp_path, GOOD)])
    assert known["mine"] == Configuration(
        "mine",
        "all there is to say",
        ("kvm_amd.npt=N", "no5lvl", "isolcpus=1-3"),
        ("kvm.lapic_timer_advance=N",),
        ("+la57", "-vgif"),
        cpus=4,
        memory=6144,
        nodes=2,
        soft_sev=False,
    )
    assert next(iter(known)) == configurations.DEFAULT
    settings = "kvm_amd.npt=N, no5lvl, isolcpus=1-3, kvm.lapic_timer_advance=N, +la57, -vgif, 4 CPUs"
    assert known["mine"].settings() == f"{settings}, 6144 MiB, 2 nodes, without the software AMD-SP"


def test_a_later_file_replaces_a_configuration(tmp_path: Path) -> None:
    known = load([write(tmp_path, '[shadow-paging]\nparameters = ["kvm_intel.ept=N"]\n')])
    assert known["shadow-paging"].parameters == ("kvm_intel.ept=N",)
    assert list(known) == list(load())


def test_kvmpys_own_set_says_what_each_is_for() -> None:
    known = load()
    assert known[configurations.DEFAULT].settings() == ""
    assert all(entry.about for entry in known.values())
    settings = [entry.settings() for entry in known.values()]
    assert len(set(settings)) == len(settings), "two are the same"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[mine", "is no TOML: "),
        ("mine = 5", "configuration 'mine': a configuration is a table, [mine]"),
        ("[Mine]", "configuration 'Mine': a name has small letters"),
        ('["a,b"]', "a name has small letters"),
        ("[mine]\nparameter = []", "unknown key 'parameter'; did you mean parameters?"),
        ('[mine]\nparameters = "kvm.a=1"', "'parameters' is a list of texts"),
        ("[mine]\nparameters = [1]", "'parameters' is a list of texts"),
        ('[mine]\nparameters = ["kvm.a"]', "'parameters': 'kvm.a' is not like kvm_amd.npt=0"),
        ('[mine]\nparameters = ["a b"]', "'parameters': 'a b' is no kernel parameter"),
        ('[mine]\noptional = ["no5lvl"]', "'optional': 'no5lvl' is not like kvm_amd.npt=0"),
        ('[mine]\ncpu = ["la57"]', "'cpu': 'la57' is not like +la57 or -vgif"),
        ("[mine]\ncpus = 0", "'cpus' is a number from 1 to 255"),
        ("[mine]\ncpus = true", "'cpus' is a number from 1 to 255"),
        ("[mine]\nnodes = 65", "'nodes' is a number from 1 to 64"),
        ("[mine]\nmemory = 6", "'memory' is a text such as"),
        ('[mine]\nmemory = "6T"', "'memory': '6T' is no size such as 512M or 4G"),
        ("[mine]\nsoft-sev = 1", "'soft-sev' is true or false"),
        ("[mine]\nabout = 1", "'about' is text"),
    ],
)
def test_a_file_that_says_what_cannot_be(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigurationError) as caught:
        load([path])
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"none\.toml cannot be read: No such file"):
        load([tmp_path / "none.toml"])


def test_names_on_the_command_line() -> None:
    known = load()
    assert [entry.name for entry in chosen("no-nested, default", known)] == ["no-nested", "default"]
    assert chosen("all", known) == list(known.values())
    for text, says in (
        ("shadow-pagin", "no configuration shadow-pagin; did you mean shadow-paging?"),
        ("zzz", "no configuration zzz; there are default, "),
        ("default,default", "default is named twice"),
        (",", "no configuration is named"),
    ):
        with pytest.raises(ConfigurationError, match=says.replace("?", r"\?")):
            chosen(text, known)


@pytest.mark.parametrize(
    ("name", "wanted", "real", "same"),
    [
        ("kvm_amd.npt", "0", "N", True),
        ("kvm_amd.npt", "off", "N", True),
        ("kvm_amd.npt", "Y", "N", False),
        ("kvm.halt_poll_ns", "0x10", "16", True),
        ("kvm.halt_poll_ns", "abc", "200000", False),
        ("kvm.nx_huge_pages", "force", "Y", True),
        ("kvm.nx_huge_pages", "force", "N", False),
        ("kvm.nx_huge_pages", "off", "N", True),
        ("kvm.nx_huge_pages", "auto", "N", True),
        ("kvm.nx_huge_pages", "never", "never", True),
        ("kvm_amd.npt", "force", "Y", False),
    ],
)
def test_values_as_the_kernel_reads_and_shows_them(name: str, wanted: str, real: str, same: bool) -> None:
    assert is_value(name, wanted, real) is same


def test_which_configuration_sets_a_parameter() -> None:
    known = load().values()
    found = configurations.with_parameter(known, "kvm_amd.npt", "0")
    assert found is not None
    assert found.name == "shadow-paging"
    assert configurations.with_parameter(known, "kvm_amd.npt", "Y") is None
    assert configurations.with_parameter(known, "kvm.force_emulation_prefix", "1") is not None
    assert configurations.with_parameter(known, "kvm.nonesuch") is None

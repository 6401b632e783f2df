# SPDX-License-Identifier: Apache-2.0
"""ci/recipes: files for other people's CI say what kvmpy and these systems understand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvmpy.testing import ktap
from kvmpy.testing.verdicts import TestVerdict, Verdict
from tests.testing.support import unknown_options

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "ci" / "recipes"
FILES = sorted(path for path in RECIPES.rglob("*") if path.is_file() and path.suffix not in ("", ".pyc"))
FILES.append(RECIPES / "Containerfile")
# A command's words up to where the shell goes on.
COMMAND = re.compile(r"(?:^|[\s;(`/])(kvmpy [a-z]+[^|;&`)#]*)")


def commands(path: Path) -> list[str]:
    """Return the commands of kvmpy that a file has, without the variables in them."""
    found: list[str] = []
    for line in path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        # Of a remark, what is in backquotes or stands in a line of its own.
        prose = line.startswith("#") and not line.startswith("#   ") and not line.startswith("#SBATCH")
        parts = re.findall(r"`([^`]+)`", line) if prose or path.suffix == ".py" else [line]
        found += [match.group(1) for part in parts for match in COMMAND.finditer(part)]
        # A list of words.
        words = re.findall(r'\["kvmpy",([^\]]*)', line)
        found += ["kvmpy " + " ".join(re.findall(r'"([\w:-]+)"', each)) for each in words]
    return [" ".join(re.sub(r"\$\{[^}]*\}|[\"'`]", " ", each).split()) for each in found]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_commands_exist_with_their_options(path: Path) -> None:
    """No recipe names a command or an option that kvmpy does not have."""
    for line in commands(path):
        # What comes behind the image's name, or another program's own options, is not kvmpy's.
        assert unknown_options(line) == [], line


def test_the_check_sees_a_wrong_option() -> None:
    assert unknown_options("kvmpy run --lab never --no-such x") == ["--no-such"]
    assert unknown_options("kvmpy fleet join a:1 --hosts x") == ["--hosts"]
    assert unknown_options("kvmpy nonesuch") == ["nonesuch"]
    found = {" ".join(line.split()[:3]) for path in FILES for line in commands(path)}
    assert {"kvmpy doctor", "kvmpy run --lab", "kvmpy fleet join", "kvmpy pack build"} <= found


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".sh"], ids=lambda path: path.name)
def test_scripts_are_scripts(path: Path) -> None:
    shell = "bash" if "bash" in path.read_text().splitlines()[0] else "sh"
    done = subprocess.run([shell, "-n", path], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def fake(folder: Path, name: str) -> Path:
    """Put a program into *folder* that notes how it was called; return the file of notes."""
    folder.mkdir(exist_ok=True)
    notes = folder / f"{name}.calls"
    script = folder / name
    script.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> "{notes}"\n')
    script.chmod(0o755)
    return notes


def test_lava_gets_a_case_for_each_test(tmp_path: Path) -> None:
    """A skip is a skip, a loss is unknown, an expected failure is none; names have nothing of the shell's."""
    notes = fake(tmp_path / "bin", "lava-test-case")
    verdicts = {
        "a/test_1.py::test_ok[none-1 $(x)]": Verdict.PASS,
        "a/test_1.py::test_bad": Verdict.FAIL,
        "b/test_2.py::test_skip": Verdict.SKIP,
        "b/test_2.py::test_known": Verdict.XFAIL,
        "b/test_2.py::test_lost": Verdict.LOST,
    }
    entries = [
        TestVerdict(name, name, "a", verdict, "host", reason="ok 7 not ok 8 # SKIP", details="ok 9 x")
        for name, verdict in verdicts.items()
    ]
    selected = [*verdicts, "c/test_3.py::test_never"]
    (tmp_path / "out.ktap").write_text(ktap.render(entries, ["a header"], selected))
    subprocess.run(
        ["sh", RECIPES / "lava-cases.sh", tmp_path / "out.ktap"],
        env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        timeout=30,
        check=True,
    )
    assert notes.read_text().splitlines() == [
        "a_test_1.py.test_ok_none-1_x_ --result pass",
        "a_test_1.py.test_bad --result fail",
        "b_test_2.py.test_skip --result skip",
        "b_test_2.py.test_known --result pass",
        "b_test_2.py.test_lost --result unknown",
        "c_test_3.py.test_never --result unknown",
    ]


def test_the_lava_definition_has_what_lava_wants() -> None:
    yaml = pytest.importorskip("yaml")
    values = yaml.safe_load((RECIPES / "lava-test.yaml").read_text())
    assert {"metadata", "params", "run"} == set(values)
    assert values["metadata"]["format"] == "Lava-Test Test Definition 1.0"
    assert re.fullmatch(r"[\w.-]+", values["metadata"]["name"])
    assert all(isinstance(value, str) for value in values["params"].values())
    steps = values["run"]["steps"]
    assert all(isinstance(step, str) for step in steps)
    done = subprocess.run(["sh", "-n"], input="\n".join(steps), text=True, timeout=30, check=False)
    assert done.returncode == 0
    known = set(values["params"]) | {"status"}
    assert set(re.findall(r"\$\{?([A-Za-z_]+)", "\n".join(steps))) <= known


def test_tuxrun_boots_what_it_packed(tmp_path: Path) -> None:
    """The overlay has kvmpy and the pack where the command inside looks for them."""
    calls = fake(tmp_path / "bin", "tuxrun")
    packer = tmp_path / "bin" / "kvmpy"
    packer.write_text('#!/bin/sh\n[ "$1 $2 $3" = "pack build -o" ] && echo a pack > "$4"\n')
    packer.chmod(0o755)
    keeper = tmp_path / "bin" / "rm"
    keeper.write_text(
        f'#!/bin/sh\nfor last; do :; done\ncp "$last/overlay.tar.xz" {tmp_path}\nexec /bin/rm "$@"\n'
    )
    keeper.chmod(0o755)
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "kvmpy.pex").write_text("a pex")
    subprocess.run(
        ["sh", RECIPES / "tuxrun.sh", "bzImage", "memory"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "ROOTFS": "rootfs.ext4"},
        timeout=60,
        check=True,
    )
    options, _, inside = calls.read_text().strip().partition(" -- ")
    words = inside.split()
    listed = subprocess.run(
        ["tar", "-tf", tmp_path / "overlay.tar.xz"], capture_output=True, text=True, timeout=30, check=True
    ).stdout
    assert {f".{words[0]}", f".{words[words.index('--pack') + 1]}"} <= set(listed.split())
    assert "--kernel bzImage --rootfs rootfs.ext4" in options
    assert words[-1] == "memory"


def test_the_workflow_is_one_of_github() -> None:
    checker = shutil.which("check-jsonschema", path=Path(sys.executable).parent)
    if checker is None:
        pytest.skip("check-jsonschema is not installed: pip install 'kvmpy[dev]'")
    for path in (RECIPES / "github-actions.yml", *(ROOT / ".github" / "workflows").glob("*.yml")):
        command = [checker, "--builtin-schema", "vendor.github-workflows", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout


def test_a_job_of_slurm_joins_the_fleet() -> None:
    """dask-jobqueue's own script, with kvmpy's command in place of its worker."""
    pytest.importorskip("dask_jobqueue", reason="dask-jobqueue: pip install 'kvmpy[dev]'")
    command = [sys.executable, "slurm_jobs.py", "rack1:8786", "--queue", "epyc", "--pack", "a b.pack"]
    done = subprocess.run(command, cwd=RECIPES, capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("#!")
    directives = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert {"-J kvmpy-fleet", "-p epyc", "-n 1", "-t 04:00:00", "--exclusive"} <= set(directives)
    assert not [each for each in directives if "--mem" in each or "--cpus" in each]
    (join,) = [line for line in lines if line and not line.startswith("#")]
    assert join == ("kvmpy fleet join rack1:8786 --certificate fleet.pem --name slurm-1 --pack 'a b.pack'")
    assert unknown_options(join) == []
    checked = subprocess.run(["bash", "-n"], input=done.stdout, text=True, timeout=30, check=False)
    assert checked.returncode == 0


def test_the_container_is_no_root() -> None:
    """What the image runs has the rights of the group that opens /dev/kvm, and no more."""
    lines = (RECIPES / "Containerfile").read_text().replace("\\\n", " ").splitlines()
    instructions = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    names = [name for name, _ in instructions]
    assert set(names) <= {"FROM", "RUN", "COPY", "USER", "WORKDIR", "ENTRYPOINT", "CMD"}
    assert names[0] == "FROM"
    assert names.index("RUN") < names.index("USER") < names.index("ENTRYPOINT")
    values = dict(instructions)
    assert json.loads(values["ENTRYPOINT"]) == ["kvmpy"]
    assert unknown_options(f"kvmpy {json.loads(values['CMD'])[0]}") == []
    assert "--device /dev/kvm" in "\n".join(lines)

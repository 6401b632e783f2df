# SPDX-License-Identifier: Apache-2.0
"""What a lab kernel is shown of this machine: what a session needs, at its place, and nothing else."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from kvmpy.lab import kernels, root, runs, tools
from kvmpy.lab.errors import LabError
from kvmpy.lab.qemu import Options
from kvmpy.lab.root import Root


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with keys, a project and a file in it."""
    folder = tmp_path / "home"
    for name in (".ssh", "project", "other"):
        (folder / name).mkdir(parents=True)
    (folder / ".ssh" / "id").write_text("a key of this test")
    (folder / "test_own.py").write_text("def test(): pass\n")
    monkeypatch.setenv("HOME", str(folder))
    return folder


def build(tmp_path: Path, *wanted: Path, needed: tuple[Path, ...] = ()) -> Root:
    return root.build(tmp_path / "root", needed, wanted)


def test_only_what_is_asked_for_is_shared(tmp_path: Path, home: Path) -> None:
    layout = build(tmp_path, home / "project", needed=(Path(sys.base_prefix),))
    expected = {Path("/usr"), home / "project", Path(sys.base_prefix).resolve()}
    assert {share for share in layout.shares if not str(share).startswith(("/usr", "/lib"))} <= expected
    assert layout.shows(home / "project" / "a.py")
    for hidden in (
        "/etc/shadow",
        "/etc/passwd",
        str(home / ".ssh" / "id"),
        str(home / "other"),
        "/root/.bashrc",
    ):
        assert not layout.shows(Path(hidden)), hidden
    # The copies that are in the root itself hold no secret either.
    texts = [
        path.read_bytes() for path in layout.folder.rglob("*") if path.is_file() and not path.is_symlink()
    ]
    assert not any(b"a key of this test" in text for text in texts)
    assert not (layout.folder / "etc" / "shadow").exists()
    accounts = (layout.folder / "etc" / "passwd").read_text().splitlines()
    assert any(line.startswith("root:x:0:") for line in accounts)
    assert all(line.split(":")[1] == "x" for line in accounts)


def test_a_home_is_not_shared_but_a_file_of_it_that_was_named(tmp_path: Path, home: Path) -> None:
    lab_root = build(tmp_path, home, home / "test_own.py")
    assert not lab_root.shows(home)
    inside = lab_root.folder / home.relative_to("/")
    assert [path.name for path in inside.iterdir()] == ["test_own.py"]


def test_a_folder_with_keys_is_private_whosever_it_is(tmp_path: Path, home: Path) -> None:
    (home / "other" / ".gnupg").mkdir()
    assert root.is_private(home / "other")
    assert root.is_private(tmp_path)
    assert root.is_private(Path("/"))
    assert not root.is_private(home / "project")


def test_links_lead_where_they_lead_here(tmp_path: Path, home: Path) -> None:
    """As of a virtual environment's python, or of a folder whose name has a version."""
    (home / "other" / "v1").mkdir()
    (home / "other" / "v1" / "python").write_text("")
    (home / "other" / "current").symlink_to("v1")
    (home / "project" / "python").symlink_to(home / "other" / "current" / "python")
    layout = build(tmp_path, needed=(home / "other" / "current", home / "project" / "python"))
    assert home / "other" / "v1" in layout.shares
    inside = layout.folder / home.relative_to("/")
    assert os.readlink(inside / "other" / "current") == "v1"
    assert os.readlink(inside / "project" / "python") == str(home / "other" / "current" / "python")


def test_one_share_for_folders_in_each_other(tmp_path: Path, home: Path) -> None:
    (home / "project" / "deep").mkdir()
    layout = build(tmp_path, home / "project" / "deep", home / "project")
    assert home / "project" in layout.shares
    assert home / "project" / "deep" not in layout.shares


@pytest.mark.parametrize("word", ["/proc/cpuinfo", "/sys/kernel", "/etc/shadow", "/dev/null"])
def test_the_insides_own_folders_stay_its_own(tmp_path: Path, home: Path, word: str) -> None:
    layout = build(tmp_path, Path(word))
    assert not layout.shows(Path(word))
    assert not (layout.folder / word[1:]).exists()


def test_a_file_that_the_inside_covers_is_an_error(tmp_path: Path, home: Path) -> None:
    file = Path("/tmp") / f"test_kvmpy_{os.getpid()}.py"
    file.write_text("")
    try:
        with pytest.raises(LabError, match=r"/tmp is another one inside[\s\S]*folder of its own"):
            build(tmp_path, file)
    finally:
        file.unlink()


def test_a_name_with_a_space(tmp_path: Path, home: Path) -> None:
    (home / "my tests").mkdir()
    layout = build(tmp_path, home / "my tests")
    places = [line.split()[1] for line in layout.mounts.splitlines()]
    assert str(home / "my tests").replace(" ", "\\040") in places


LOOK = """
for path in /etc/shadow {home}/.ssh {home}/.bash_history /var/log; do
	[ -e "$path" ] && echo "SEEN $path"
done
grep -c . /proc/mounts >/dev/null && echo "HOME" $(ls -A {home})
find / -maxdepth 6 '(' -path /proc -o -path /sys -o -path /usr ')' -prune -o -name '*.secret' -print |
	sed 's/^/SEEN /'
{python} -c 'import kvmpy, pytest, sys; print("PYTHON", sys.prefix)'
printf 'int main(void) {{ return 0; }}' | gcc -x c -o /tmp/a.out - && /tmp/a.out && echo COMPILED
cat {file}
"""


@pytest.mark.timeout(300)
@pytest.mark.xdist_group("lab")
def test_a_look_from_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Keys and hashes are not there; Python, gcc and the current folder are."""
    if shutil.which(tools.QEMU) is None or not kernels.cached():
        pytest.skip("needs QEMU and a lab kernel in the cache: kvmpy lab build")
    here = tmp_path / "here"
    here.mkdir()
    (here / "file").write_text("MY FILE\n")
    (tmp_path / "beside.secret").write_text("not for you")
    monkeypatch.chdir(here)
    script = LOOK.format(home=Path.home(), python=sys.executable, file=here / "file")
    status = runs.shell(Options(kernels.find(), memory=1024), ["sh", "-c", script])
    text = capfd.readouterr().out
    assert status == 0
    assert "SEEN" not in text.replace('echo "SEEN', ""), text
    home = next(line for line in text.splitlines() if line.startswith("HOME")).split()[1:]
    assert set(home) <= {".cache", ".pyenv", ".local"}
    for word in (f"PYTHON {sys.prefix}", "COMPILED", "MY FILE"):
        assert word in text, text

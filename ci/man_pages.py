# SPDX-License-Identifier: Apache-2.0
"""Writes a man page for each command of kvmpy: man_pages.py FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from click_man.core import write_man_pages

import kvmpy
from kvmpy.cli.main import main as group


def main() -> None:
    """Write the pages into the folder named on the command line."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    context = click.Context(group, info_name="kvmpy")
    # click-man asks a group for the commands that it holds; these come when they are called.
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        group.add_command(command, name)
    write_man_pages("kvmpy", group, version=kvmpy.__version__, target_dir=str(folder), date=kvmpy.__version__)
    print(f"{folder}: {len(list(folder.glob('*.1')))} pages")


if __name__ == "__main__":
    main()

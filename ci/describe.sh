#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# What hatch-vcs makes the version from: the last tag of a release, or the release of kvmpy/__init__.py where the history
# has no tag (a shallow clone, a repository of one's own).
cd "$(dirname "$0")/.." || exit
git describe --dirty --tags --long --match 'v[0-9]*' 2>/dev/null ||
	echo "v$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' kvmpy/__init__.py)-$(git rev-list --count HEAD)-g$(
		git describe --always --dirty --exclude='*'
	)"

#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Tries what an air-gapped host gets, in an empty environment and a network namespace without a network: the wheels of
# a folder are installed into a fresh environment, a single file runs as it is. Then kvmpy runs a few tests.
#
# without_network.sh FOLDER|FILE
set -eu
what=$(realpath "$1")
python=$(command -v "${PYTHON:-python3}")
python=$(realpath -s "$python")
empty=$(mktemp -d)
trap 'rm -rf "$empty"' EXIT

alone() {
	env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME="$empty" PEX_ROOT="$empty/pex" \
		unshare --map-root-user --net "$@"
}

cd "$empty"
if [ -d "$what" ]; then
	"$python" -m venv environment
	alone environment/bin/pip install --quiet --no-index --find-links "$what" kvmpy
	kvmpy=environment/bin/kvmpy
else
	kvmpy=$what
fi
alone "$kvmpy" --version
# Nothing of it needs KVM or a compiler.
alone "$kvmpy" measure --help >measure
alone "$kvmpy" decode --help >decode
alone "$kvmpy" doctor --json >doctor
grep -q '"kvmpy": ' doctor
if [ -w /dev/kvm ]; then
	alone "$kvmpy" run --lab=never --protection none apic/test_state.py msr/test_lists.py
fi

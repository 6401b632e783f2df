#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Boots a kernel with tuxrun and runs kvmpy in it: tuxrun.sh KERNEL [TEST...]. dist/kvmpy.pex is that of `make pex`; the
# root file system needs its version of Python. A pack stands in for a compiler there.
set -eu
kernel=$1
shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/overlay/opt/kvmpy"
cp dist/kvmpy.pex "$work/overlay/opt/kvmpy/kvmpy"
kvmpy pack build -o "$work/overlay/opt/kvmpy/suite.pack" "$@"
tar -C "$work/overlay" -cJf "$work/overlay.tar.xz" .
tuxrun --device qemu-x86_64 --enable-kvm --kernel "$kernel" --rootfs "${ROOTFS:?a root file system with Python}" \
	--overlay "file://$work/overlay.tar.xz" --timeouts commands=120 \
	--results "${RESULTS:-results.json}" -- \
	/opt/kvmpy/kvmpy run --lab never --kselftest --pack /opt/kvmpy/suite.pack "$@"

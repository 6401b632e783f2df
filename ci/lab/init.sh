#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The first process of a lab kernel. The root is the host's, read-only; the share "kvmpyjob" says what to run.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp/home LANG=C.UTF-8 TERM="${TERM:-linux}"
mount -t proc proc /proc
mount -t sysfs sys /sys
[ -c /dev/null ] || mount -t devtmpfs dev /dev
mount -t tmpfs -o mode=755 run /run
mkdir -p /run/kvmpy/job /run/kvmpy/root /dev/pts /dev/shm
mount -t devpts -o ptmxmode=666 pts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t 9p -o trans=virtio,version=9p2000.L,msize=524288,ro kvmpyjob /run/kvmpy/job
mount --bind / /run/kvmpy/root
mount -t tmpfs tmp /tmp
mkdir -p "$HOME" /tmp/cache/kvmpy
mount -t debugfs debug /sys/kernel/debug 2>/dev/null
ip link set lo up 2>/dev/null

for port in /sys/class/virtio-ports/*; do
	[ -e "$port/name" ] && ln -s "${port##*/}" "/dev/$(cat "$port/name")"
done

# Sets the environment and the command, as "$@".
. /run/kvmpy/job/job.env

# What the tests need and the tmpfs hide.
for path in $KVMPY_LAB_KEEP; do
	case $path in
	/tmp/* | /run/*)
		mkdir -p "$path"
		mount --bind "/run/kvmpy/root$path" "$path"
		;;
	esac
done

# Guest programs that the host has compiled: the cache is in memory, its entries are names by content.
if [ -d "${KVMPY_LAB_PROGRAMS:-}" ]; then
	case $KVMPY_LAB_PROGRAMS in
	/tmp/* | /run/*) KVMPY_LAB_PROGRAMS=/run/kvmpy/root$KVMPY_LAB_PROGRAMS ;;
	esac
	mkdir -p /tmp/cache/kvmpy/guest
	ln -s "$KVMPY_LAB_PROGRAMS"/[0-9a-f]* /tmp/cache/kvmpy/guest/ 2>/dev/null
fi

cd "$KVMPY_LAB_FOLDER" || cd /
if [ "${KVMPY_LAB_SHELL:-}" = 1 ]; then
	setsid -c "$@" </dev/ttyS0 >/dev/ttyS0 2>&1
else
	# A warning ends the kernel at once, so that it is known which test was running.
	echo 1 >/proc/sys/kernel/panic_on_warn
	"$@" </dev/null >/dev/kvmpy.output 2>&1
	status=$?
	printf '\n{"event": "exit", "status": %d}\n' "$status" >/dev/kvmpy.journal
fi
# With -no-reboot QEMU ends here.
echo b >/proc/sysrq-trigger

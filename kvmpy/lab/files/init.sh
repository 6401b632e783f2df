#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The first process of a lab kernel. The root is small, in memory, and read-only once it is set up. The host's
# programs come by the first mount and a share says what to run; or a session waits, in memory, for its job.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp/home LANG=C.UTF-8 TERM="${TERM:-linux}"
[ -c /dev/null ] || mount -t devtmpfs dev /dev
mount -n -t proc proc /proc
mount -a -T /etc/fstab
mkdir -p "$HOME" /tmp/cache/kvmpy/guest
ip link set lo up 2>/dev/null &

for port in /sys/class/virtio-ports/*; do
	[ -e "$port/name" ] || continue
	read -r name <"$port/name" && ln -s "${port##*/}" "/dev/$name"
done

# These set the environment and the command, as "$@".
if [ -e /etc/kvmpy-session ]; then
	. /etc/kvmpy-session
else
	. /run/kvmpy/job/job.env
	# Guest programs that the host has compiled: the cache is in memory, its entries are names by content.
	if [ -d "${KVMPY_LAB_PROGRAMS:-}" ]; then
		ln -s "$KVMPY_LAB_PROGRAMS"/[0-9a-f]* /tmp/cache/kvmpy/guest/ 2>/dev/null
	fi
	cd "$KVMPY_LAB_FOLDER" || cd /
fi

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

#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Says what a build of kvmpy lacks on this machine and which command installs it; exit 1 when something is missing.
# With --packages it prints the missing Debian packages on one line instead.
set -u
python=${PYTHON:-python3}
missing='' debian='' fedora=''

lacks() { # what, Debian packages, Fedora packages
	missing="$missing
  $1"
	debian="$debian $2"
	fedora="$fedora $3"
}

if ! command -v "$python" >/dev/null 2>&1; then
	lacks "$python" 'python3 python3-venv python3-dev' 'python3 python3-devel'
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
	lacks "Python 3.10 or newer ($python is $("$python" -V 2>&1)); set PYTHON to a newer one if it is installed" \
		'python3 python3-venv python3-dev' 'python3 python3-devel'
else
	"$python" -c 'import venv, ensurepip' 2>/dev/null ||
		lacks "the venv module of $python" python3-venv python3
	"$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' ||
		lacks "Python.h, the headers of $python" python3-dev python3-devel
fi
command -v "${CC:-gcc}" >/dev/null 2>&1 || lacks "a C compiler (${CC:-gcc})" 'gcc libc6-dev' 'gcc glibc-devel'
command -v as >/dev/null 2>&1 && command -v ld >/dev/null 2>&1 || lacks 'as and ld, of binutils' binutils binutils
command -v make >/dev/null 2>&1 || lacks make make make

if [ "${1:-}" = --packages ]; then
	echo "${debian# }"
	exit 0
fi
[ -z "$missing" ] && exit 0
sudo=
[ "$(id -u)" = 0 ] || sudo='sudo '
{
	echo "kvmpy cannot be built here. Missing:$missing"
	if command -v dnf >/dev/null 2>&1; then
		echo "Install with:  ${sudo}dnf install$fedora"
	else
		echo "Install with:  ${sudo}apt-get install$debian"
	fi
} >&2
exit 1

#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Says what a build of kvmpy lacks on this machine and which command installs it; exit 1 when something is missing.
# With --packages it prints the missing Debian packages on one line instead. With the word lab, also what the lab
# needs to build and boot kernels; with the word browser, what the tests of the HTML page need.
set -u
python=${PYTHON:-python3}
packages='' lab='' browser=''
for word; do
	case $word in
	--packages) packages=1 ;;
	lab) lab=1 ;;
	browser) browser=1 ;;
	*) echo "usage: prerequisites.sh [--packages] [lab] [browser]" >&2 && exit 2 ;;
	esac
done
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

has_header() {
	# Without a compiler there is no telling, and that one is named already.
	! command -v "${CC:-gcc}" >/dev/null 2>&1 ||
		echo "#include <$1>" | "${CC:-gcc}" -E - >/dev/null 2>&1
}

if [ -n "$lab" ]; then
	command -v qemu-system-x86_64 >/dev/null 2>&1 ||
		lacks qemu-system-x86_64 qemu-system-x86 qemu-system-x86-core
	for tool in flex bison bc rsync; do
		command -v $tool >/dev/null 2>&1 || lacks $tool $tool $tool
	done
	command -v xz >/dev/null 2>&1 || lacks xz xz-utils xz
	has_header gelf.h || lacks 'gelf.h, of libelf' libelf-dev elfutils-libelf-devel
	has_header openssl/opensslv.h || lacks 'openssl/opensslv.h, of OpenSSL' libssl-dev openssl-devel
	if command -v apt-get >/dev/null 2>&1; then
		[ -e "${KEYRING:-/usr/share/keyrings/debian-archive-keyring.gpg}" ] ||
			lacks "Debian's archive keys" debian-archive-keyring ''
	fi
fi

if [ -n "$browser" ]; then
	command -v chromium >/dev/null 2>&1 || lacks chromium chromium chromium
	command -v chromedriver >/dev/null 2>&1 || lacks chromedriver chromium-driver chromedriver
fi

if [ -n "$packages" ]; then
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

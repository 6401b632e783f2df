#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Tells LAVA of each test in a KTAP report of kvmpy: lava-cases.sh FILE. A test that was lost, or not started, is
# `unknown`; one that failed as expected is `pass`, as in KTAP.
set -eu
awk '
$1 == "#" && $2 == "Subtest:" { file = $3; next }
match($0, /^  (not )?ok [0-9]+ /) {
	result = /^  not/ ? "fail" : "pass"
	name = substr($0, RLENGTH + 1)
	if (i = index(name, " # ")) {
		directive = substr(name, i + 3)
		name = substr(name, 1, i - 1)
		if (directive ~ /^SKIP/)
			result = "skip"
		if (directive ~ /^ERROR/)
			result = "unknown"
	}
	name = file "." name
	gsub(/[^A-Za-z0-9._-]+/, "_", name)
	print name, result
}' "$1" | while read -r name result; do
	lava-test-case "$name" --result "$result" </dev/null
done

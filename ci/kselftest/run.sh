#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# kvmpy as one test of a kselftest installation: put this folder into it as `kvmpy`, and the line
# `kvmpy:run.sh` into kselftest-list.txt. KVMPY_TESTS narrows what runs, such as "memory dirty".
exec kvmpy run --kselftest ${KVMPY_TESTS:-}

# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: every figure of kvmpy beside a bare C loop that does the same, compiled for it, in one run."""

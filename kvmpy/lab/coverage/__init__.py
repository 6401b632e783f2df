# SPDX-License-Identifier: Apache-2.0
"""Which lines of KVM tests execute: gcov's counters from a lab kernel, kept, merged and asked."""

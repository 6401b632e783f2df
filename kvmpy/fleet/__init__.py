# SPDX-License-Identifier: Apache-2.0
"""Tests on many hosts: distributed carries what they say, and kvmpy's journal judges."""

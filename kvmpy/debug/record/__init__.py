# SPDX-License-Identifier: Apache-2.0
"""Records of what a program asked of KVM: written, read, replayed, cut down, and turned into C."""

# SPDX-License-Identifier: Apache-2.0
"""Builds kernels, boots them under QEMU and runs tests inside; needs no /dev/kvm."""

# SPDX-License-Identifier: Apache-2.0
"""KVM's objects: one class for every kind of file descriptor, one funnel for every ioctl."""

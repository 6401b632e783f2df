# SPDX-License-Identifier: Apache-2.0
"""The protections, the ladder that picks one, and the KVM object that makes complete VMs."""

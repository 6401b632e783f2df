# SPDX-License-Identifier: Apache-2.0
"""What watches KVM from outside: it needs only the kernel's interface, not the rest of kvmpy."""

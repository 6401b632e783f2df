# SPDX-License-Identifier: Apache-2.0
"""The recorder that `kvmpy trace` loads into other programs: C source, build, and the shared memory."""

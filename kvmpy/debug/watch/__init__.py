# SPDX-License-Identifier: Apache-2.0
"""What watches other processes: ptrace, the preloaded recorder's rings, tracefs, debugfs, uevents."""

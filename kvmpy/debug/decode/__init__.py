# SPDX-License-Identifier: Apache-2.0
"""What decodes: ioctls as words, words as bytes, an observer that prints, timelines."""

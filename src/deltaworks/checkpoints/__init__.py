"""Bytes on disk to tensors and back. Knows nothing of merging or serving."""

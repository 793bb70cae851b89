"""Cells: files, counts, tokens, blocks, the store."""

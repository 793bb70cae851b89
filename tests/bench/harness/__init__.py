"""What the benches share: rows and their table, environments of their own, drivers measured in turns.

A folder and no file, because `make bench` runs every file beside this folder as a bench.
"""

"""What `tests.bench.train` measures: loops, networks, stores. A folder, because `make bench` runs files."""

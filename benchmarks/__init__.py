"""One file a claim. `python -m benchmarks [name …]` runs them and writes
benchmarks/results/<name>.json."""

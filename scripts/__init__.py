"""Benchmarks and the making of the miniatures, run from the root as `python -m scripts.bench.train`."""

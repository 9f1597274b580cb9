"""Benchmarks of `swarmlm bench`: each measures its reference in the same run. Called by the cli only."""

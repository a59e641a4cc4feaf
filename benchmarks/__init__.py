"""Benchmarks: `python -m benchmarks NAME`; results are JSON with versions and device."""

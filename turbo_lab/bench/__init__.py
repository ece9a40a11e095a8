"""Paired benchmarks, run by `turbo-lab bench`."""

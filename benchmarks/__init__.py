"""Benchmarks: each a module to run, each with its table under benchmarks/results/."""

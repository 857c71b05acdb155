"""Throughput, memory and capacity: scenarios in YAML, all variants of one interleaved in one run."""

"""Benchmarks of `fla_simple_gla`, behind one command: `python -m benchmarks --help`."""

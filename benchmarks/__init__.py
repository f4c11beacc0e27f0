"""Measurements behind the numbers in the documentation; each writes JSON to ``benchmarks/results``."""

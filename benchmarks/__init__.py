"""What a trace costs, as ratios to the untraced forward of the same run: ``python -m benchmarks --help``."""

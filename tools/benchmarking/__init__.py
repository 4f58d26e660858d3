"""What tools/benchmark.py measures and how: shapes, contenders, timing and reports, one module each."""

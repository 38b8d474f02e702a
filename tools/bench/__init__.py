"""What ``tools/benchmark.py`` is made of: options, work, child processes that do it in turn, tables."""

"""Changed and hostile inputs of every kind, and how the package ends on each: see benchmarks/README.md."""

"""Find the faulty part of a network: alignment of two graphs of one Swin, comparison, cause."""

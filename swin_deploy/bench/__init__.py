"""Measure latency, throughput, memory and cold start of a bundle."""

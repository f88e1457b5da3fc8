"""Measures acceptance on the real engine, and compares it with the exact expectation. Behind `make demo` and `bebop bench`."""

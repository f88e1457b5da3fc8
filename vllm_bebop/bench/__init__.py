"""Measures acceptance on the real engine and compares it with its exact expectation."""

"""Formulas of restoration, from the papers alone: loops and float64, nothing of sslmed."""

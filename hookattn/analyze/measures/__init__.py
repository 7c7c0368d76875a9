"""Measures: one number for each head of a call, each kind in a file."""

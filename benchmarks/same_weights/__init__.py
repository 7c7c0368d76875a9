"""The same weights out of four tools, and the pages that three viewers make of them: run, and held against float64.

``make compare`` writes docs/comparison.md of it.
"""

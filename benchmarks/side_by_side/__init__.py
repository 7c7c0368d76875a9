"""Ten experiments on heads, written as users of hookattn, TransformerLens and nnsight write them, and run.

``make compare`` runs them on the same weights, holds their results against each other, and writes
docs/comparison-edits.md of the code that ran. Each experiment is a function of the same name in one module a library.
"""

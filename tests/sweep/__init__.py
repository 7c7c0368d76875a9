"""Every model type of the installed transformers, tiny and random, traced in each attention implementation.

The cases are made from the configuration classes: :mod:`shrink` makes a configuration small, :mod:`classes` finds the
model class, :mod:`weights` draws parameters that make attention far from uniform, :mod:`inputs` makes what the forward
takes, :mod:`recipes` says by hand what no rule can. :mod:`check` runs one case, :mod:`pool` all of them, and
:mod:`report` writes docs/coverage.md. :mod:`beside` holds what is recognised of a model against following it
(``python -m tests.sweep --beside``). ``python -m tests.sweep --help`` is the way in.
"""

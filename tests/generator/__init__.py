"""A generator of attention modules as researchers write them, each judged against explicit float64 mathematics.

Every case is drawn from a seed: its source is written anew (:mod:`.source`, with the words of :mod:`.writer`), run and
traced. What it computes is computed a second time, from the same parameters, by :mod:`.truth`, which knows nothing of
layouts (:mod:`.check`: both agree). :mod:`.judge` compares what was recorded with that. Nothing here looks into the
code that is tested.

    python -m tests.generator --cases 2000 --seed 1 --processes 2     counts, and the failures grouped by their features
    python -m tests.generator --only 1234 --show                      the source of one case, and what was recorded
    python -m tests.generator --cases 2000 --having score=cosine     only with this feature
    python -m tests.generator --cases 2000 --group layout product     the failures grouped by these features
    python -m tests.generator --cases 2000 --beside                   follows beside what is recognised of each

The case with seed ``n`` is the same in every run: ``--cases 2000 --seed 1`` runs the cases 1 to 2000.

Outcomes: ``right`` (all letters followed or documented, the values equal), ``parts`` (right, in several calls that say
the how many-th of how many they are, and not which heads or queries), ``guessed`` (some letter is marked so),
``skipped`` (the path is in ``trace.skipped``), ``wrong``, ``silent`` (nothing said), ``crash`` (tracing raised). With
``--beside`` each is traced several times (:mod:`tests.beside`) and is the ``same`` each time, or ``differs``.
"""

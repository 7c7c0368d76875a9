"""What is private of torch, each piece in one place: the rest of the package asks here.

Each module says what it does and why no public way does. The pieces were tried on torch 2.8 and 2.13, the ends of the
range that the README names; tests/torch_internals/test_compatibility.py has one test for each, which fails on a torch
where the piece has changed. Names that a torch lacks are looked up by :mod:`~hookattn.torch_internals.private`.
"""

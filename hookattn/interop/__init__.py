"""Traces in the shapes and names of other libraries, one library a file; none is imported before it is asked for."""

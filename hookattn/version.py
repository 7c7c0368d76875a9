"""The version of this package, which trace files name too."""

__version__ = "0.1.0"

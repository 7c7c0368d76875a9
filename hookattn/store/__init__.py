"""Named tensors and one JSON document in a plain safetensors file: written as a stream, read lazily."""

from .format import FORMAT_VERSION
from .reader import LazyFile
from .writer import StreamWriter, write_file

__all__ = ["FORMAT_VERSION", "LazyFile", "StreamWriter", "write_file"]

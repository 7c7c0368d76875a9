"""Named tensors and one JSON document in a plain safetensors file: written as a stream, read lazily."""

from hookattn.store.format import FORMAT_VERSION
from hookattn.store.reader import LazyFile
from hookattn.store.writer import StreamWriter, write_file

__all__ = ["FORMAT_VERSION", "LazyFile", "StreamWriter", "write_file"]

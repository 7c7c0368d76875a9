"""What tokenizers write, read once: pieces of words, words, and tokens as a person reads them."""

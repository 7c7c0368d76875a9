"""Words and tables in a terminal."""

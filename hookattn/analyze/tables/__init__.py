"""Tables and matrices that are made of all calls of a trace, each kind in a file."""

"""The bytes of a trace, told before it runs."""

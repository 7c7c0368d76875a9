"""What a trace is made of, and how it is read: sites, calls, certificates, positions, tokens."""

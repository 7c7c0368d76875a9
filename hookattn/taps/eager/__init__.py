"""The tap of attention written out by hand: torch's operations followed from q·k to weights·v."""

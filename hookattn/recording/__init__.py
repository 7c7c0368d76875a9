"""A running trace: what becomes of a kernel call between the tap and the Trace."""

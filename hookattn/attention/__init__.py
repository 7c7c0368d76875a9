"""The math of a record, pure: from a kernel's real arguments to scores, masks and weights."""

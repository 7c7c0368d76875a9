"""The steps of a generation put together."""

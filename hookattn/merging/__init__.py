"""What several processes traced of one model, put together."""

"""Which modules of a model attend: adapters, their registry, and what is found without them."""

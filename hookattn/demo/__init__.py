"""Small models and data that ship with the package, so that examples and tests run offline."""

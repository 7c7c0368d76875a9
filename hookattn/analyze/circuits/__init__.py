"""The weights of heads, found in any model by the values that its products compute, and what is read off them."""

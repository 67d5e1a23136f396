"""4-bit linears: quantising, saving and reading them."""

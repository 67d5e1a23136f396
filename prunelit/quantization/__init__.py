"""4-bit linears: rounding, storing and reading them."""

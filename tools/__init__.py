"""What the maintainers of the packages run; no part of them."""

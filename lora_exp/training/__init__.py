"""A step and what surrounds it."""

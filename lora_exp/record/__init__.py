"""A number or word going out."""

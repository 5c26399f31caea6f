"""Many trainers, one base: the jobs of a sweep train together, each bit for bit as if alone."""

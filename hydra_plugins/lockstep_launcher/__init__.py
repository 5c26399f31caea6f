"""Hydra's launcher for `-m`: the jobs of a sweep train in lockstep over one base."""

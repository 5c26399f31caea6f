"""Hydra's launcher for `-m`: a sweep trains in lockstep over one base."""

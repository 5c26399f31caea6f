"""Hydra's sweeper `search`: proposes a sweep's jobs from the results of earlier ones."""

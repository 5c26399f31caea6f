"""Trackers: where metrics and artifacts go in addition to the run's directory.

wandb  metrics and artifacts to W&B
"""

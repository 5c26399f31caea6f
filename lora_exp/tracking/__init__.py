"""A tracker: where numbers and artifacts go beside the run's directory.

wandb  numbers and artifacts to W&B
"""

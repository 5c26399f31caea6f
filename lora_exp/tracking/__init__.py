"""Trackers: where metrics and artifacts go in addition to the run's directory.

tracker      the interface, and RunInfo
flat         nested configs as plain pairs
wandb        metrics and artifacts to W&B
tensorboard  event files of TensorBoard
mlflow       a folder or server of MLflow
trackio      a local database, by Trackio
several      a run's trackers as one
search       trials of a search to W&B
sync         offline W&B runs, sent in order
"""

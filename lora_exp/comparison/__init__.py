"""Runs of any day, side by side, held against a baseline. Needs no torch.

run     a saved run, as read
gather  the saved runs below folders
listing      their values by key
condition    `--where`
overview     the page of `lora-exp runs`
checkpoints  deleted, if asked
"""

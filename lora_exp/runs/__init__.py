"""Saved runs: found below folders, read, selected and listed. Needs no torch.

run          a saved run, as read
gather       the saved runs below folders
condition    `--where`
listing      their values by key
overview     the page of `lora-exp runs`
checkpoints  deleted, if asked
"""

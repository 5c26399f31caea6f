"""Runs of any day, side by side, held against a baseline. Needs no torch.

run         a saved run, as read
gather      the saved runs below folders
keys        keys of configs that differ
statistics  differences and their intervals
budget      warnings of unequal runs
group       runs equal but for seed
value       the comparison: groups and baseline
table       its tables: terminal, CSV, JSON
"""

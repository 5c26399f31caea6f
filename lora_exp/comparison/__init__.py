"""Runs of any day, side by side, held against a baseline. Needs no torch.

keys        keys of configs that differ
statistics  differences and their intervals
row_losses  differences of losses over rows
budget      warnings of unequal runs
group       runs equal but for seed
value       the comparison: groups and baseline
table       its tables: terminal, CSV, JSON
theme       how figures look
scale       axes and ranges of figures
points      runs as points of figures
curves      metrics over steps, and rungs
importance  how much a key explains
effects     the objective against each key
parallel    parallel coordinates
costs       Pareto front, and each task
layers      where each layer changed
figures     all figures, by name
decision    the result in sentences
sections    the tables of the report
answers     answers to the same prompts
page        the report as HTML
report      writes it, after a sweep too
live        while its jobs train
workspace   a saved workspace of W&B
"""

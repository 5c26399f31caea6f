"""A number or word going out.

console   words, tables and curves
run       a run's directory
metrics   a trainer's numbers, passed on
progress  first row and progress
summary   the words before and after
card      the model card
sweep     a sweep's table
"""

"""What a run writes and prints: its record, metrics, tables and cards.

console   words, tables and curves
run       a run's directory
standing  how a directory's run stands
contents  whether a run's files have changed
clock     seconds and tokens of training
metrics   a trainer's metrics, passed on
progress  first row and progress
summary   what is printed before and after
card      the model card
sweep     a sweep's table
"""

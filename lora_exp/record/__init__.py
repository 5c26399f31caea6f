"""What a run writes and prints: its record, metrics, tables and cards.

console   text, tables and curves
run       a run's directory
follower  the record in several processes
standing  the status of a directory's run
contents  whether a run's files have changed
conditions  device, threads, versions
clock     seconds and tokens of training
metrics   a trainer's metrics, passed on
progress  first row and progress
summary   printed before and after training
card      the model card
ranking   a sweep's jobs in order
sweep     a sweep's table on disk
"""

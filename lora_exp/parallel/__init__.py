"""One run in several processes; what is written, the first one writes.

world    this process among the run's
launch   starts the processes, waits for them
nodes    the same on nodes of Slurm
"""

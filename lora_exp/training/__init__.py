"""A step, and what surrounds it.

interruption  SIGTERM and Ctrl-C: save, then stop
guards        stops a training that leads nowhere
housekeeping  work left out of every step
checkpoint    whole or absent; the newest whole
answers       greedy answers before and after
place         alone, or seated in a pack
measure       held-out rows before and after
trainer       the algorithm's trainer, built and guarded
"""

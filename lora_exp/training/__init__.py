"""Training: the trainer, checkpoints, interruption, and evaluation before and after.

interruption  SIGTERM and Ctrl-C: save, then stop
guards        stops on NaN and missing gradients
housekeeping  saves repeated work in each step
averages      evaluations as means over tokens
best          which evaluation was the best
checkpoint    complete or absent; finds the newest
answers       greedy answers before and after
place         alone, or in a lockstep pack
flattened     batches that are one sequence
measure       held-out rows before and after
trainer       the algorithm's trainer, built and guarded
"""

"""Training: the trainer, checkpoints, interruption, and evaluation before and after.

interruption    SIGTERM and Ctrl-C: save, then stop
guards          stops on NaN and missing gradients
housekeeping    saves repeated work in each step
row_losses      the loss of each held-out row
longest_first   the order of held-out rows
averages        evaluations as means over tokens
best            which evaluation was the best
manifest        a checkpoint's hashes; the newest intact
checkpoint      complete or absent; the best kept
saved_weights   a checkpoint's, by their own names
rotation        old checkpoints are deleted
rollouts        answers still learnt from, in checkpoints
resumption      intervals and rate of new arguments
unlogged        means not logged yet, in checkpoints
answers         greedy answers before and after
place           alone, or in a lockstep pack
inputs          rows, tokens, questions; once a pack
preparation     what there is before a trainer
flattened       batches that are one sequence
untrained       what was measured before, cached
processes       starts several, waits for them
draws           each process its own
measure         held-out rows before and after
early_stopping  measured at rungs, stopped there
shares          each process saves its own
zero            the optimizer's state, shared out
fsdp            all weights that train, shared out
trainer         the algorithm's trainer, built and guarded
loop            from a checkpoint to the end
"""

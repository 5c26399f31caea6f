"""An algorithm of ours; the others are TRL's.

ppo_losses  PPO's formulas on plain tensors
critic      the value beside a policy
rollout     answers sampled, scored, held against reference
ppo         policy and value learn from rollouts
seq2seq     encoder-decoder models
"""

"""The algorithms that we implement; the others are TRL's.

ppo_losses  PPO's formulas on plain tensors
critic      PPO's critic (value model)
rollout     sampled answers, rewards, KL to reference
ppo         policy and critic trained on rollouts
seq2seq     encoder-decoder models
"""

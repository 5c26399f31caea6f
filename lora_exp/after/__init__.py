"""Tools for what was saved: inspect, merge, prove, chat, serve and publish.

saved         what is saved at a path
base_config   a config that loads its base
output        whether a path may be written
loading       an adapter on its base
inspection    what it is, which layers changed
saving        an adapter copied from its run
combination   several LoRAs become one
merging       adapters into their base
prompts       read from files
routing       another model's choices of experts
difference    two models on one prompt
weighted_sum  several LoRAs' updates, from their files
rounding      what rounded weights change in logits
tolerance     how far a merge may be
proof         a merge compared with its adapter
soundness     whether a whole model is usable
completion    answers to a file of prompts
conversation  turns, settings, several models
chat          in a terminal or pipe
evaluation    with and without the adapter
endpoints     OpenAI's interface to loaded models
serving       which models, by which engine
reproduction  a run trained again
relaunch      a sweep trained again
likeness      whether two runs are equal
verdict       what `reproduce` prints
publication   uploads to the Hub
doctor        whether this machine can train
models        models of conf/model, their sizes
estimate      memory that a run needs
base_bytes    quantised weights, without the weights
pages         what the commands print

The modules take paths, and return paths or what `lora_exp.cli` prints.
"""

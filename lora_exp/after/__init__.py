"""Something saved: looked at, proven, talked to, served and sent on.

saved         what lies at a path
output        whether a place may be written
loading       an adapter on its base again
inspection    what it is, which layers changed
saving        an adapter out of its run
merging       adapters into their base
prompts       rows that ask something
difference    two models on one prompt
weighted_sum  several LoRAs' updates, from their files
proof         a merge held against its adapter
soundness     a whole model, as it lies
completion    answers to a file of prompts
conversation  turns, settings, several models
chat          the terminal, or a pipe
evaluation    with the adapter and without
endpoints     OpenAI's interface over loaded models
serving       what is served, by which engine
publication   to the Hub
doctor        whether this machine can train
estimate      what a run would take
pages         what the commands print

Every module takes paths and gives paths, or what can be printed; `lora_exp.cli` prints it.
"""

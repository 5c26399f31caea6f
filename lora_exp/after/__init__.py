"""Life after training: what was saved is looked at, proven, talked to, served and sent on.

Every module takes paths and gives paths, or what can be printed; `lora_exp.cli` prints it.
"""

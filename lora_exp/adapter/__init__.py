"""An adapter: put on, saved, refused, several.

untrusted  untrusted files: no patterns, no code
mounting   a saved adapter mounted, or refused
rows       rows of embeddings that train
roles      what each layer is for
targets    roles and names, resolved
attach     attach, save
stacks     LoRAs of experts and single weights
updates    the norm of each module's update
several    several adapters on one base
"""

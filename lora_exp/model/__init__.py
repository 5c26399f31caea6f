"""The base: frozen weights and their tokenizer.

loading         the base, quantised while it loads
quantised       what stays in floats, and back
prequantised    saved quantised: kept or dequantised
text_part       language model of a multimodal one
weights         all read, or drawn at random
identity        what identifies a base's weights
precision       what it computes in
determinism     torch's switches, restored after runs
invariance      products whatever the number of rows
special_tokens  tokens that end and pad
mixture         routers of mixtures of experts
experts         where they are; in 4 bits
participation   layers that get a gradient
packing         whether packed rows stay apart
padding         whether prompts see it
placement       devices of a base
sharded         layers shared out among processes
sharing         several models over the same weights
scoring         scores at a row's last token
vocabulary      tokens and their embeddings
memory          peak and free
requirement     upper bound of training's memory
processor       features that decide how it computes
processor_files  what prepares images, copied
"""

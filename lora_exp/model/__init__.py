"""The base: frozen weights and their tokenizer.

loading         the base, quantised while it loads
identity        what identifies a base's weights
precision       what it computes in
special_tokens  tokens that end and pad
memory          peak and free
requirement     what training takes, from above
processor       what decides how products are computed
"""

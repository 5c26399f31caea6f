"""The base: frozen weights and their tokenizer.

loading  the base, quantised while it loads
memory   peak, free and needed
"""

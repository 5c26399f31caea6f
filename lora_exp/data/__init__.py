"""A row, from its fields to tokens.

formats   what rows look like, and become
tasks     the generated tasks and their answers
rows      read, checked, split
template  chat templates: turns to text
rendered  a row as text, its answers
tokens    rows to tokens and labels, cached
examples  what each trainer takes, counted
"""

from lora_exp.data.rows import Rows as Rows

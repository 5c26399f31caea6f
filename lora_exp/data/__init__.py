"""A row, from its fields to tokens.

turns       a chat's turns, checked
formats     how rows are written
shapes      what algorithms learn from
reading     files of rows
tasks       the generated tasks and their answers
conversion  a row, by its format
rows        read, converted, split
template    chat templates: turns to text
rendered    a row as text, its answers
tokens      rows to tokens and labels, cached
examples    what each trainer takes, counted
"""

from lora_exp.data.rows import Rows as Rows

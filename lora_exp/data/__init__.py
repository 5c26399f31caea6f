"""A row, from its fields to tokens.

turns       a chat's turns, checked
questions   well-known columns of questions
formats     how rows are written
shapes      what algorithms learn from
reading     files of rows
stored      rows in a temporary file
tasks       the generated tasks and their answers
conversion  a row, by its format
rows        read, converted, split
template    chat templates: turns to text
marks       marks that locate turns
rendered    a row as text, its answers
encoding    a row to tokens and labels
processes   work in several processes
tokens      all rows' tokens, cached
examples    what each trainer takes, counted
"""

from lora_exp.data.rows import Rows as Rows

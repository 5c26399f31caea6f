"""A pack: many trainers, one base, each bit for bit as if alone.

state         what a process has only one
hub           jobs as greenlets, served together
eligibility   bases and adapters a pass takes
grouping      which rows share a product
segment       one job's rows in a pass
probe         sums that show their order
classes       numbers of rows computed alike
rowwise       a layer run once for several
linear        a base layer, the jobs' adapters
verification  passes held against runs alone
attention     positions and attention, per job
body          one pass for several jobs
passes        one forward, one backward for all
pack          jobs that share a base
seat          a job's place in a pack
plan          which jobs train together
table         a pack on one screen
worker        the process that trains a plan
"""

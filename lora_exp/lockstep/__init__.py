"""A pack: many trainers, one base, each bit for bit as if alone.

state    what a process has only one
hub      jobs as greenlets, served together
segment  one job's rows in a pass
linear   a base layer, the jobs' adapters
exact    what may be computed together
body     one pass for several jobs
pack     trainers in step, one backward
seat     a job's place in a pack
plan     which jobs train together
table    a pack on one screen
worker   the process that trains a plan
"""

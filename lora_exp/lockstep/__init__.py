"""A pack: many trainers, one base, each bit for bit as if alone.

plan          which jobs form a pack
state         process-wide state, switched between jobs
hub           jobs as greenlets, served together
eligibility   bases and adapters that share passes
products      which rows share a product
padding       left out of a pass
segment       one job's rows in a pass
probe         rows that show summation order
classes       numbers of rows computed alike
replacement   in place of a base module
rowwise       a layer run once for several
linear        a base layer, the jobs' adapters
outputs       what a body returns
verification  passes compared with runs alone
attention     heads computed for each job
layout        how segments form passes
layers        a body's forward, layer by layer
segmentwise   modules run for each job
fusing        which modules run for all
proof         random rows, together and alone
body          one pass for several jobs
passes        one forward, one backward for all
pack          jobs that share a base
seat          a job's place in a pack
brackets      which jobs are compared
table         a pack on one screen
devices       where workers compute
work          jobs for a worker
link          a worker's pipe to the launcher
events        a worker's events in a file
job           a job as Hydra runs it
worker        the process that trains a plan
workers       processes among which work is dealt
engine        Slurm or Ray, as used here
slurm         Slurm's commands
ray           Ray's tasks
cluster       work dealt out on other machines
"""

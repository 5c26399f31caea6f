"""A trial: one cell that a search chooses. Needs no torch.

space       keys, options and intervals to search
presence    keys that only some options have
settings    what the command line asks for
objectives  several objectives: names and values
limits      the most a cell may need
sizes       what cells need, estimated apart
trial       one cell and its result
journal     the search's file, appended only
halton      points that fill a space evenly
cells       cells within the limits
study       the next trials, from earlier ones
apart       a sampler in its own process
evidence    trials of finished sweeps
page        the plan and the result, printed
"""

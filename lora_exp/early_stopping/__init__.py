"""Early stopping: which jobs of a sweep, or which runs, end before their last step.

rules    the options of conf/early_stopping
rungs    the steps where jobs are compared
bracket  jobs that are compared
"""

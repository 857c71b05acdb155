"""Methods against each other on several data sets: a grid of runs, and the page that it amounts to.

    python -m benchmarks.evidence benchmarks/evidence.yaml        (make evidence)

docs/evidence.md says how it is measured. `grid` is what is asked for, `plan` the runs that follow and their
order, `sequences` those that follow a log, `running` one run, `workers` the processes, `session` many
runs side by side, `records` what they leave behind, `summary` and `comparing` what it amounts to, `page`
how it is told.
"""

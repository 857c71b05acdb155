"""Kills trainings at random moments: each must resume by itself and end with the same bits.

    python -m benchmarks.chaos --trials 30        (make chaos N=30)

One training on two ranks runs undisturbed, the reference. Every trial is the same training, killed by SIGKILL
at a random occurrence of one moment (`plan.MOMENTS`), and judged by `verdict`. What kills stands around the
product (`rank`), not in it.
"""

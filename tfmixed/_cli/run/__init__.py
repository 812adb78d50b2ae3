"""`tfmixed run`: an unchanged script, run in this process with mixed precision applied to what it makes.

    command -> wishes -> script (runs it) + policies, training, loops, tf1 (apply) -> ledger (log, report, last line)

Nothing is applied before the script imports the framework itself: it may choose backend and devices first.
"""

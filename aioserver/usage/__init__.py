"""Usage: the costs of attempts at providers, by caller.

An attempt that was sent costs tokens: those that its provider reports, or an *estimate* of them.
Once it has ended, its *cost* is part of the request's outcome. The *accounting* knows the attempts
that were sent and have not ended; it adds each cost to the *sums* of its caller, and passes it to
the ledger.

The *sums* are in memory: a *row* for each caller, provider and model, today and yesterday. `GET
/usage` and the metrics of tokens show them, with *columns* that have the same names everywhere.

The *ledger* is on disk, if there is one: a *line* of JSON for each attempt, in files by day, which
outlives the process. A line may say that an attempt is *running*; another one of the same attempt
replaces it. The *ledger reader* adds lines up, each attempt once.
"""

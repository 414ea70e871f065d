"""Monitoring: the state of the server, shown to people and to programs.

Once a second, at a *tick*, the monitor builds one *snapshot*: the state of the places, streams and
providers, the *totals* so far, and what was measured during the *interval* since the last tick,
such as rates and the lag of the event loop. The *sources* are the objects from which all this is
read.

`/stats` shows the newest snapshot. The *history* keeps a point of each for ten minutes. A
*watcher* is a client of `/events`: it is sent the history, then each snapshot as it is made.

A *section* is a wing's part of all this. Where there are several instances, each *reports* its
snapshot, and the *fold* makes one of them, by the *rule* that each field declares.

The state tells the *usage* of providers by *keys*, and each *group* of models with its members.

A *finding* is a row of the table of what can be wrong, with the words that every display shows. An
*alert* says which of them is true of a provider now, and is its `trouble` in `/stats`; the
*verdict* is the worst that is true of the server.

An *incident* is something that an operator should know, such as the death of a provider. The
*detector* finds incidents in the difference of two ticks. Repeated incidents are gathered: after
one incident of a kind comes a *quiet time*, and the next one says how much has happened meanwhile.

`/metrics` is *Prometheus text*. Its counters and histograms are those of the folder `telemetry`;
its gauges are read from a fresh snapshot, so that `/metrics` and `/stats` cannot disagree.
"""

"""Monitoring: the state of the server, shown to people and to programs.

Once a second, at a *tick*, the monitor builds one *snapshot*: the state of the places, streams and
providers, and the *totals* so far. It also has the measurements of the *interval* since the last
tick, such as rates and the lag of the event loop. The *sources* are the objects from which all
this is read.

`/stats` shows the newest snapshot. The *history* keeps the main numbers of each snapshot for ten
minutes. A *watcher* is a client of `/events`: it gets the history, then each new snapshot.

A *section* is a wing's part of the snapshot. In a cluster each instance *reports* its snapshot,
and the *fold* combines these snapshots into one, by the *rule* that each field declares.

The snapshot also has the *usage* of each *key*, and each *group* of models with its members.

A *finding* is one thing that can be wrong, with the words in which every display shows it. An
*alert* is the worst finding about one provider now, its `trouble` in `/stats`. The *verdict* is
the worst finding about the whole server.

An *incident* is something that an operator should know, such as the death of a provider. The
*detector* finds incidents in the difference of two ticks. Repeated incidents are gathered: after
one incident of a kind comes a *quiet time*, and the next one says how much has happened meanwhile.

`/metrics` is *Prometheus text*. Its counters and histograms are those of the folder `telemetry`;
its gauges are read from a fresh snapshot, so that `/metrics` and `/stats` cannot disagree.
"""

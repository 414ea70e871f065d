"""Telemetry: what the server counts, and what it logs, while it serves requests.

*Counters* and *histograms* are plain numbers, held by the objects that count. The *metrics* hold all
of them: a *meter* for each *face* (a protocol shown to clients), one for each *provider*, and what
belongs to neither. Together they make *families*: a name, labels, and a child for each set of labels.

When a client's request is admitted and understood, a *record* of it begins. It goes along with the
request, and whatever serves the request notes in it when that happened, how often a provider was
tried, and the longest *gaps* in the answer: the provider's *silence*, our own *delay*, and the time
during which the client read nothing. The *lag* of the event loop says how much of a silence is ours.

When the request ends, the *request log* adds its record to the metrics and writes one *log line*.
Lines are written by a thread, from a bounded queue: logging never blocks the event loop.

What the *kernel* knows of the process and its sockets is read where somebody asks for it.
The folder `monitoring` shows all of this to people and programs.
"""

"""Telemetry: the counts, the log lines and the traces that the server makes while it serves
requests.

*Counters* and *histograms* are plain numbers, held by the objects that count. The *metrics* hold
all of them: a *meter* for each *face* (a protocol shown to clients), one for each *provider*, and
the numbers of the server as a whole. Together they make *families*: a name, labels, and a child
for each set of labels.

*Bookkeeping* is the border behind which no bug of a counter, a record or a trace fails an answer.
A request that meets a *bug* of the server is counted with the place of the bug in the code.

When a client's request is admitted and understood, a *record* of it begins. It goes along with the
request, and whatever serves the request notes in the record when each step happened, how often a
provider was tried, and the longest *gaps* in the answer: the provider's *silence*, our own
*delay*, and the time during which the client read nothing. Its *outcome* says what became of it at
the providers. The *lag* of the event loop tells how much of a silence was our own delay.

When the request ends, the *request log* adds its record to the metrics and writes one *log line*.
Lines are written by a thread, from a bounded queue: logging never blocks the event loop.

Where a *tracer* is plugged in, the record of a request has a *trace*: notes of its *waits* and
*attempts*.

What the *kernel* knows of the process and its sockets is read when a page or a metric shows it.
The folder `monitoring` shows all of this to people and programs.
"""

"""Telemetry: the counts, the log lines and the traces that the server makes while it serves
requests.

*Counters* and *histograms* are plain numbers, held by the objects that count. The *metrics* hold
all of them: a *meter* for each *face* (a protocol shown to clients), one for each *provider*, and
the numbers of the server as a whole. Together they make *families*: a name, labels, and a child
for each set of labels.

*Bookkeeping* is the border behind which a bug of a counter, a record or a trace cannot fail an
answer. A request that meets a *bug* of the server is counted, with the bug's place in the code.

A *record* begins when a client's request was admitted and parsed. It accompanies the request and
notes when each step happened, how often a provider was tried, and the longest *gaps* in the
answer. These are the provider's *silence*, our own *delay*, and the time during which the client
read nothing. Its *outcome* describes its attempts at providers. The *lag* of the event loop shows
how much of a silence was our own delay.

When the request ends, the *request log* adds its record to the metrics and writes one *log line*.
Lines are written by a thread, from a bounded queue: logging never blocks the event loop.

If there is a *tracer*, the record of a request has a *trace*: notes of its *waits* and *attempts*.

The *kernel*'s data about the process and its sockets are read when a page or a metric shows them.
The folder `monitoring` shows all of this to people and programs.
"""

"""Traces of requests (OpenTelemetry): without them a request has only a log line and metrics.

The *tracer* begins a *trace* with the record of a request. While the request runs, the trace has
notes of its *waits* and its *attempts*; a client that reads the answer of another request is a
*visit*. At the end *spans* are made of the notes, as bytes (`otlp`), and an *exporter* sends them
to a *collector*, in batches, from a bounded queue. A *meter* counts attempts by the same notes.
"""

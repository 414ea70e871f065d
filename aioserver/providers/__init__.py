"""Providers: how a request reaches a model, and how its answer comes back.

A *request* is independent of the provider that answers it. Its *API* is the meaning of its path:
chat completions here, and the APIs that wings add. One try of it at one *provider* is an
*attempt*. An attempt *bids* for the provider's *capacity*: it starts when a *place* is free, one
of `concurrent_requests`, and the *pace* allows it: so many requests per minute. An answer in the
*background* uses a part of the places.

A provider is *well*, *sick* or *dead*; its *breaker* decides which. Many attempts at a sick
provider fail and some succeed, so it is asked after a provider that is well. Nothing succeeds at a
dead provider, so it gets only *trials*. A provider is *away* if it cannot be reached or says that
it is not ready: requests may wait in its queue until it is back. A request whose attempt has just
failed is *parked* before it queues again, and keeps its slot meanwhile. Its *health* has this
breaker and two more facts: whether the provider has refused our key (it is *flagged*), and whether
it was removed from the configuration. The provider reports the outcome of each attempt to breaker,
pace and queue. The *budget* bounds the retries, so that a failing provider does not get a multiple
of the requests.

The attempt that has started takes a connection from the *pool*, the open sockets to one provider.
The request and its answer on this connection are an *exchange*. It pushes the body into a *sink*,
which makes events of a stream from it, or collects a body that was not streamed. *Holding* keeps a
part of a turn back until the turn's finish. The *error mapping* reads a status, or an error in the
body, as a *fault*, which says whether a retry or another provider may help. The time for which a
provider sends nothing, in the answers under way, is its *silence*.

The *registry* has every provider by name, and applies new settings to them while answers run.
Where new settings need new connections, the old pool is *retired*: it serves the requests that it
has, and closes. The wing `simulator` is a provider of our own, for demonstrations and tests.

*Backpressure* pauses an exchange whose readers are slow. A *passthrough* hands over request and
answer as they come, and an *upload* sends a body piece by piece. *Rate headers* report the rest of
the provider's limits, and *costs* are the tokens and the work of attempts. A *verdict* is what one
answer has shown about its provider, and a *stall* is an answer that has stopped coming.
"""

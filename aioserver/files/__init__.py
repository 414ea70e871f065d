"""Files: reading those that settings name.

The *reading* of a file takes all of it, up to a bound, and reports why it cannot be read, without
any part of its content.

A *certificate* identifies a host or a client in TLS, and is signed by an *authority*. It stands in
a file with its *intermediates*, the certificates of its signers, and makes a *pair* with the file
of its key. Its dates and names are read by the rules of X.509.

A *watched file* is read again when it has changed while the server runs, so that certificates and
keys can be renewed. A change that cannot be used has no effect: the former content stays in use.
"""

"""Files: how those are read that settings name.

The *reading* of a file takes all of it, up to a bound, and says why it cannot be read without any
part of its content.

A *certificate* is what TLS shows of a host or a client, signed by an *authority*. It stands in a
file with its *intermediates*, the certificates of those who have signed, and makes a *pair* with
the file of its key. What a certificate says, its dates and names, is read by the rules of X.509.

A *watched file* is read again once it has changed, while the server runs: certificates and keys are
renewed so. A change that cannot be used leaves in effect what was read before.
"""

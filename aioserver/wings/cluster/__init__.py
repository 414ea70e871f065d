"""The cluster: without it each process serves alone, with limits, streams and conversations of its
own.

Several processes and machines share these through one Redis or Valkey server. An *instance* is one
process of the cluster; its name says where it runs, and a process that is started again is another
instance. An instance's *membership* lasts from its start to its end. It has one *connection* to
the server for its reports about limits, and another one for commands. The *totals* are the
operating pages of all instances together.

The instances share *limits* (limits/) and *answers* (answers/). The turns of *conversations* that
clients name are in the server, too.
"""

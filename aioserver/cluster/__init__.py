"""Several instances of the server as one."""

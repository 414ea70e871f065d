"""The core of the server, as it must work whatever wing is gone (tests/test_wings.py)."""

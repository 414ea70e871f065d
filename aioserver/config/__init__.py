"""The configuration: a YAML file and the environment to settings.

`Configuration` is the public name; `settings` has the values that it holds.
"""

from aioserver.config.configuration import Configuration

__all__ = ["Configuration"]

"""The configuration: one YAML file and the environment become settings.

file           YAML 1.1 in UTF-8: `--config`, `$AIOSERVER_CONFIG`, `./config.yaml`, or the shipped
document       the file as plain values, each with its place; `document.py` parses it
place          the line and column of a value, or the variable that set it
reference      `${NAME}` in a scalar: it is replaced by a variable of the environment
override       a variable `AIOSERVER__CHAT__WEBSOCKET__PORT`: it sets a value of the document
schema         what a document must look like; `schema.py` makes it from the settings classes
section        a mapping of the document, and the settings class that it becomes
setting        one key of a section: a validator, a meaning and a default
validator      checks and converts one value; all of them are in `validators.py`
rule           what must hold between settings, such as `max_keepalive <= max_connections`
fault          a place, a path and a message; all faults of a document are reported together
settings       frozen objects, one for each section: `chat.py`, `llm.py`, `settings.py`
credentials    the keys that settings name; `credentials.py` finds them in files and variables
keys file      the file of client keys that `auth.keys_file` names; commands may change it
models         names that lead to groups: each group has members, and each member a provider
inheritance    `like`: a provider has the settings of another one
hint           what to write instead of a wrong value, in a fault
JSON Schema    the schema for editors; `json_schema.py` writes it
view           plain data or names made of settings, secrets masked: `views.py`
Configuration  settings that are valid, with their source and warnings: `configuration.py`
"""

from aioserver.config.configuration import Configuration

__all__ = ["Configuration"]

"""The scripts that the server of a cluster runs (wings/cluster/limits/*.lua), run here by a Lua of
Python's: over keys in memory, with time as an argument.

The script of renewals is the server of tests in which time is virtual. So what has to hold is looked at in the script
itself. It holds however calls are lost, late or repeated, servers emptied and processes stopped:
the places that instances may use are never more than the limit. So a place has one holder at each
moment, in the eyes of the server, and who may hold places that the server does not know of is
waited for before anything is given:

1. A call that was given up may still arrive. Calls have numbers (`seq`), and one that is not newer
   than the last is refused.
2. A *world* is one life of the server's state; it has a name of its own, its `epoch`. In the first
   seconds of a world the server gives nothing (it is *blind*): those who live in another world
   have places, and come within a beat. The ones that somebody knew are woken and, if they do not
   come, their part of each limit is kept until their leases are over.
3. A server that nobody has called for longer than any beat was away itself (stopped, paused, cut
   off), and so is each lease longer than it seems. The same goes for a server that is not the
   process it was: a replica that lags has forgotten its last answers, and so has one that has
   loaded a file: it is blind until each member has called, or its lease is over, which may have
   been renewed just before. No lease ends meanwhile.
4. An instance without a call for the length of its lease is no member; its places are free. It
   lets go of them earlier by its own clock, from the moment of sending on.
5. Above a limit (somebody came back, or the limit was lowered) whoever calls may not use all that
   is too much, and gives it back with its next call. Nothing starts on such a place before.
6. Fixed shares are for times without a server: of N instances each has `limit // N`, and the first
   `limit % N` one more. Instances may have heard of different members then. So whoever is new has
   no share until all others have said that they know of it; and whoever has vanished without a
   word is counted for a while, as it may be alone somewhere. A share only falls with a higher rank
   and with more instances, so the sum of all shares is at most the limit.

The starts of a pace are one number, the time of its next slot. A server that is new or has moved
may have forgotten some of them: while it is blind, no pace has rested, and whoever comes says when
the next slot begins, as far as it knows.

Between instances start-time fair queueing (as in limits/fair_queue.py) decides whose turn it is,
weighted by the callers that wait there. One that does not come for what it was given gets no more,
or a stopped process would collect all places.
"""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import Any

import msgspec
from lupa import lua51

from aioserver.wings.cluster.limits.lease_messages import Request

PREFIX = "aio:{test}:"
decode_request = msgspec.msgpack.Decoder(Request).decode


class Stale(Exception):
    """The call was given up, since a later one has been answered, or the server has just begun."""


@functools.cache
def _lua() -> Any:
    """The interpreter; its texts are bytes."""
    return lua51.LuaRuntime(encoding=None, register_eval=False, register_builtins=False)


@functools.cache
def _packing() -> Any:
    """What the scripts call `cmsgpack`: what they pack stays a table, of which nobody has another
    part; so the state is not converted with each call.
    """
    return _lua().eval(
        b"""function(unpack_bytes)
          local function copied(value)
            if type(value) ~= 'table' then return value end
            local copy = {}
            for key, item in pairs(value) do copy[key] = copied(item) end
            return copy
          end
          return {
            pack = copied,
            unpack = function(data)
              return type(data) == 'table' and copied(data) or unpack_bytes(data)
            end,
          }
        end"""
    )(_unpack)


@functools.cache
def _script(name: str) -> Any:
    """The script *name*, as a function of what Redis gives it."""
    script = (files("aioserver") / "wings/cluster/limits" / name).read_bytes()
    body = script.partition(b"\n")[2]
    return _lua().eval(b"function(KEYS, ARGV, redis, cmsgpack) " + body + b"\nend")


class Script:
    """A server that has the script, and the *keys* that it keeps."""

    def __init__(self) -> None:
        self.keys: dict[bytes, Any] = {}
        self._now = 0.0
        self.wakes: dict[str, list[str]] = {}
        # What was read of the state since the last call.
        self._known: dict[str, Any] = {}
        self._redis = _to_lua({"call": self._call})
        self._redis[b"error_reply"] = lambda text: _to_lua({"err": text})
        self._key = _to_lua([PREFIX])

    def renew(self, request: bytes, now: float) -> tuple[bytes, dict[str, list[str]]]:
        """Return the answer, and the words that wake other instances; *now* is in microseconds.

        Raises:
            Stale: a later call of the same instance has been answered.
        """
        return self.call("renew.lua", request, now), self.wakes

    def call(self, name: str, request: bytes, now: float) -> bytes:
        """Return the answer of the script *name*; *now* is in microseconds.

        Raises:
            Stale: it is an error.
        """
        self._now, self.wakes, self._known = now, {}, {}
        answer = _script(name)(self._key, _to_lua([request]), self._redis, _packing())
        if (error := answer[b"err"]) is not None:
            raise Stale(error.decode())
        return _pack(answer)

    @property
    def world(self) -> dict[str, Any]:
        """What is kept of the members and of time; {} if nothing is."""
        return self._read("world")

    @property
    def members(self) -> dict[str, list[float]]:
        """When the lease of each member ends, in microseconds, and what else is kept of it."""
        return self.world.get("members") or {}

    def holders(self, name: str) -> dict[str, int]:
        """Return how many places each instance holds of the limit *name*."""
        holds = self._read(f"limit:{name}").get("holds") or {}
        return {instance: hold[0] for instance, hold in holds.items()}

    def snapshot(self) -> dict[bytes, Any]:
        """Return all that is kept, for `restore`."""
        # A table that was packed is never changed.
        return {
            key: dict(kept) if isinstance(kept, dict) else kept for key, kept in self.keys.items()
        }

    def restore(self, keys: dict[bytes, Any]) -> None:
        """Keep what was kept then."""
        self.keys, self._known = keys, {}
        self.keys = self.snapshot()

    def _read(self, key: str) -> dict[str, Any]:
        if key not in self._known:
            kept = self.keys.get((PREFIX + key).encode())
            self._known[key] = {} if kept is None else _from_lua(kept)
        known: dict[str, Any] = self._known[key]
        return known

    def _call(self, command: bytes, key: bytes = b"", *arguments: Any) -> Any:
        keys = self.keys
        match command:
            case b"TIME":
                return _to_lua([0, self._now])
            case b"GET":
                return keys.get(key, False)
            case b"SET":
                keys[key] = arguments[0]
            case b"EXISTS":
                return int(key in keys)
            case b"DEL":
                keys.pop(key, None)
            case b"SMEMBERS":
                return _to_lua(list(keys.get(key, ())))
            case b"SADD":
                keys.setdefault(key, {})[arguments[0]] = True
            case b"SREM":
                keys.get(key, {}).pop(arguments[0], None)
            case b"ZADD":
                keys.setdefault(key, {})[arguments[1]] = arguments[0]
            case b"PUBLISH":
                instance = key.decode().removeprefix(f"{PREFIX}wake:")
                self.wakes[instance] = _from_lua(arguments[0])
            case b"EXPIRE":
                # A day, which nobody waits for.
                pass
            case _:
                raise NotImplementedError(command)
        return None


def _pack(value: Any) -> bytes:
    """Pack as Redis does: a table without a gap from 1 on is a list, also if it is empty."""
    return msgspec.msgpack.encode(_from_lua(value))


def _unpack(data: bytes) -> Any:
    return _to_lua(msgspec.msgpack.decode(data))


def _from_lua(value: Any) -> Any:
    if lua51.lua_type(value) == "table":
        items = dict(value.items())
        if all(number in items for number in range(1, len(items) + 1)):
            return [_from_lua(items[number]) for number in range(1, len(items) + 1)]
        return {_from_lua(key): _from_lua(item) for key, item in items.items()}
    return value.decode() if isinstance(value, bytes) else value


def _to_lua(value: Any) -> Any:
    if isinstance(value, dict):
        return _lua().table_from({_to_lua(key): _to_lua(item) for key, item in value.items()})
    if isinstance(value, list):
        return _lua().table_from([_to_lua(item) for item in value])
    return value.encode() if isinstance(value, str) else value

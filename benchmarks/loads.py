"""What is put on a server: how the mock provider answers, and how the load generator asks."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One load. Times in seconds."""

    mode: str  # loadgen's: http | sse | ws; or rws: Responses over WebSocket
    connections: int
    chunks: int = 100
    interval_ms: int = 0  # 0: as fast as they come
    ramp: float = 0.0
    warmup: float = 1.0
    duration: float = 5.0
    drain: float = 10.0
    mock: tuple[str, ...] = ()  # more options of mockllm
    options: tuple[str, ...] = ()  # more options of loadgen
    body: Mapping[str, Any] | None = None  # of a request; None: a short question

    def shortened(self) -> "Load":
        """The same for --quick. A paced stream's ramp stays its length: starts stay spread out."""
        chunks = self.chunks // 2 if self.interval_ms else self.chunks
        return dataclasses.replace(
            self, chunks=chunks, ramp=self.ramp / 2, warmup=0.5, duration=self.duration / 2
        )


def agents(kilobytes: int) -> Load:
    """Requests of an agent: 20 tools, and a long history of some *kilobytes* in all."""
    words = " ".join(f"word{number % 997}" for number in range(kilobytes * 1000 // 8))
    size = len(words) // 40
    messages = [
        {
            "role": ("user", "assistant")[number % 2],
            "content": words[number * size :][:size] + "\n",
        }
        for number in range(40)
    ]
    parameters = {"type": "object", "properties": {"path": {"type": "string"}}}
    tools = [
        {
            "type": "function",
            "function": {
                "name": f"tool{number}",
                "description": "t" * 200,
                "parameters": parameters,
            },
        }
        for number in range(20)
    ]
    body = {"model": "mock-model", "tools": tools, "messages": messages}
    return Load(mode="http", connections=4, duration=3.0, body=body)


def paced(mode: str, connections: int, **changes: Any) -> Load:
    """Streams of 200 events, 50 a second each.

    Such a stream takes 4 s, and so does its ramp: at every moment as many begin as end.
    """
    load = Load(
        mode=mode, connections=connections, chunks=200, interval_ms=20, ramp=4.0, duration=6.0
    )
    return dataclasses.replace(load, **changes)


def stalled(mode: str, connections: int) -> Load:
    """Streams of which one event comes and then nothing, cut off at the end."""
    return paced(
        *(mode, connections),
        ramp=2.0,
        warmup=1.0,
        duration=1.0,
        drain=0.0,
        mock=("--stall-after", "1"),
    )

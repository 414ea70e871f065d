"""The events of one response of the Responses API, as a client reads them on one or more
connections.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.simulation.truth import Reading, Violation

if TYPE_CHECKING:
    from tests.simulation.truth import Question

# Errors of the readers of a mirror; those of the answer itself come next in its order.
MIRROR_LOST = {"server_shutdown", "instance_unavailable", "stream_not_found", "resume_gap"}


class ResponseReading:
    """What a client has read of the response to *question*; *last* is its newest sequence number,
    -1 at first.

    Always, or `Violation` is raised: sequence numbers have no gap, nothing comes after the end,
    the response has one id, and its last event has the text that the others had.
    """

    def __init__(self, question: Question) -> None:
        self.reading = Reading(question)
        self.last = -1
        self.id = ""
        self.end = ""

    def take(self, event: dict[str, Any]) -> None:
        """Take one event."""
        kind = event["type"]
        code = (event.get("error") or {}).get("code")
        # An owner that is out of reach, or has lost the answer, is an error of the mirror's
        # readers.
        lost = code in MIRROR_LOST and event["sequence_number"] <= self.last
        if code == "slow_client" or lost:
            # An error of this reader alone, which leads nobody past what was missed. It has the
            # number 0 if nothing was read, and has itself what the first event would have said.
            if event["sequence_number"] > max(self.last, 0):
                raise Violation(f"{event['sequence_number']}, after which {self.last} is lost")
        elif "sequence_number" in event:
            if event["sequence_number"] != self.last + 1:
                raise Violation(f"{event['sequence_number']} follows {self.last}")
            if self.end == "complete":
                raise Violation(f"{kind} after the end of a response")
            self.last += 1
        if kind == "response.created":
            if self.id:
                raise Violation(f"the response {self.id} is created twice")
            self.id = event["response"]["id"]
        elif kind == "response.output_text.delta":
            self.reading.add(event["delta"])
        elif kind in {"response.completed", "response.incomplete"}:
            self.end = "complete"
            self.reading.finish("complete")
            self._compare(event["response"])
        elif kind in {"response.failed", "error"}:
            self.end = f"error: {code}" if code else "error"

    def _compare(self, response: dict[str, Any]) -> None:
        if self.id and response["id"] != self.id:
            raise Violation(f"the response {self.id} ends as {response['id']}")
        text = text_of(response)
        if text != self.reading.text:
            raise Violation(f"a response with {text[-40:]!r} after {self.reading.text[-40:]!r}")


def text_of(response: dict[str, Any]) -> str:
    """Return the text of all messages in a response object."""
    return "".join(
        part["text"]
        for item in response["output"]
        if item["type"] == "message"
        for part in item["content"]
    )

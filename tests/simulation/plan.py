"""What one run tries, all of it drawn from its seed: faults, clients, limits, and what the
operator does.

Each run leaves some faults out and has more of others, since a mix of all of them hides what only
a few can show (Groce, Zhang, Eide, Chen and Regehr, "Swarm Testing", ISSTA 2012).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from math import inf
from typing import TYPE_CHECKING, Any

from tests.simulation import configuration
from tests.simulation.configuration import GATE, HTTP, ROOM, STREAMS
from tests.simulation.dials import LINK_FAULTS, SLOWEST, Dial, draw_dial
from tests.simulation.grouping import Grouping, draw_grouping

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.simulation.configuration import Key

# Seconds that a byte is on its way at most: twice the latency of the slowest link, and a moment.
LONGEST_WAY = 0.5

# What clients do beside asking and reading.
HABITS = (
    "leave",
    "return",
    "cancel",
    "ask twice",
    "read slowly",
    "half close",
    "keep alive",
    "upload slowly",
)
# Faults of the simulated provider; `<n>` is a number of tokens.
PROVIDER_FAULTS = (
    *("status-500", "status-503", "slow-down", "capacity", "retry-after-ms"),
    *("drop", "not-http", "html", "cut-<n>", "cut-mid-<n>", "bad-chunk-<n>", "end-<n>"),
    *("error-event-<n>", "error-chunk-<n>", "stall-<n>", "half-line-<n>", "comments-stall-<n>"),
    *("head-only", "silent", "bad-json-<n>", "bad-utf8-<n>", "no-done", "early-done-<n>"),
    *("after-done", "flap-<n>"),
)
# What a provider says of the question itself: nobody else is asked, and nobody goes on.
VERDICTS = ("verdict-<n>", "verdict-<n>", "status-400", "status-422")
# Faults after which no answer may end well, unless another provider has answered.
NEVER_WHOLE = frozenset(
    {
        *("cut", "cut-mid", "bad-chunk", "end", "error-event", "error-chunk", "stall"),
        *("half-line", "comments-stall", "head-only", "silent", "drop", "not-http", "html"),
        *("status-500", "capacity", "verdict", "status-400", "status-422"),
    }
)
FACES = (
    *("websocket", "sse", "stream", "whole", "keyed stream", "keyed whole", "responses"),
    "stored responses",
)
# Conversations: of the Responses API over WebSocket and over HTTP, and those that the server
# keeps.
CONVERSATIONS = ("response lanes", "response chain", "conversation")
# What a provider does with a request that continues a response: it has kept that one, it knows of
# none, or it has no `/v1/responses`, which is found out, or written in the settings.
KEEPS, FORGETS, LACKS, BRIDGED = RESPONSES = ("keeps", "forgets", "lacks", "bridged")
# What a provider does with requests for messages, and the settings for it: it is never asked for
# one, it is found to have none, it is found to have them, or it has them.
MESSAGE_SETTINGS: dict[str, bool | str] = {
    "bridged": "bridge",
    "lacks": "auto",
    "has": "auto",
    "speaks": True,
}
# Words that an engine may refuse, and the one that it may know by another name alone.
WORDS = ("parallel_tool_calls", "top_k", "stream_options", "reasoning_effort")
RENAMED = "max_tokens"
# What the operator does in the middle of a run.
OPERATIONS = ("reload limits", "reload provider", "reload keys", "drain")
# Who chooses the instance of a client: the same for all its connections, or another one for each.
BALANCERS = ("sticky", "random")
# Bytes of a large answer at a provider, at most (truth.py).
LARGEST = 300_000
# Attempts at most that continue an answer.
HOPS = 2
# Seconds that an answer may take more which another instance has: its owner is asked, and found to
# be gone.
ELSEWHERE = 30.0


# What happens to the server that instances share, and to an instance.
# What may go wrong on the connections between instances. A living one refuses none: firewalls must
# not (docs/scaling.md).
PEER_FAULTS = tuple(name for name in LINK_FAULTS if name != "refused")
SERVER_EVENTS = ("pause", "kill", "empty", "roll back")
INSTANCE_EVENTS = ("kill instance", "stop instance", "cut off")
DEPLOY = "deploy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What goes wrong between instances: the shares of messages of their server that are *lost* and
    *late*, and the faults of their *links* to each other.

    *events* happen at a moment, and last for some seconds. *fixed*: the instances know how many
    they are, as workers of a parent do.
    """

    lost: float = 0.0
    late: float = 0.0
    links: dict[str, float] = field(default_factory=dict)
    events: tuple[tuple[float, str, float], ...] = ()
    fixed: bool = False

    @property
    def lossy(self) -> bool:
        """Whether a message may be lost or late."""
        return self.lost > 0 or self.late > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One run. Times in seconds; *faults*, *habits* and *provider_links* have the share of each.

    *faults* are those of the clients' connections, *provider_links* those of our connections to
    providers.
    """

    seed: int
    clients: int
    # All clients begin within these seconds.
    spread: float
    faces: tuple[str, ...]
    faults: dict[str, float]
    habits: dict[str, float]
    # The share of questions to a model that fails, and in which ways.
    provider_fault_share: float
    provider_faults: tuple[str, ...]
    provider_links: dict[str, float] = field(default_factory=dict)
    operations: dict[str, float] = field(default_factory=dict)
    # Changes of the configuration, by dotted path.
    changes: dict[str, Any] = field(default_factory=dict)
    keys: tuple[Key, ...] = ()
    # Whether a second provider is asked where the first one fails, but by requests that name the
    # first.
    spare: bool = False
    pinned: bool = True
    # Whether an answer that breaks off is continued, by both providers.
    continued: bool = False
    # How the group of both providers chooses, which every second client asks; "" if there is none.
    grouped: str = ""
    # Groups of three providers, of which clients ask; None if there are none.
    grouping: Grouping | None = None
    # The share of clients that say nothing when it is their turn (silence.py).
    silent: float = 0.0
    # The share of clients that ask for a large answer.
    large: float = 0.0
    # The shares of clients whose question is refused by a verdict, and whose answer is a tool call.
    verdicts: float = 0.0
    calls: float = 0.0
    # The share of clients that name an agent's session, so that their calls, or turns, are held.
    sessions: float = 0.0
    # The share of clients whose chat is a turn of a talk that other callers have, too (prompts.py).
    # Without any, nobody looks for what the caches of providers have lost.
    talks: float = 0.0
    # The share of clients that ask how the request of another one has ended.
    curious: float = 0.0
    # The share of clients that upload something, most of them slowly (uploads.py).
    uploads: float = 0.0
    # The share of clients that ask for an answer in the background (background.py).
    background: float = 0.0
    # The share of clients that ask for messages (messages.py), what the first provider does with
    # them, and the others, and what words the engines refuse.
    messages: float = 0.0
    message_kinds: tuple[str, str] = ("speaks", "speaks")
    refuses: tuple[str, ...] = ()
    # The share of clients that set a deadline, or a class.
    hurried: float = 0.0
    instances: int = 1
    balancer: str = "sticky"
    # What goes wrong between the instances; None: they share nothing.
    shared: Shared | None = None
    # What the providers do with responses: one of RESPONSES.
    responses: str = KEEPS
    # Whether the server keeps conversations in an SQLite file.
    sql: bool = False
    # The share of faults after some tokens that come before the first one.
    preambles: float = 0.0

    @property
    def drains(self) -> bool:
        """Whether a server stops in the middle."""
        return "drain" in self.operations

    @property
    def fails_over(self) -> bool:
        """Whether another provider may answer than the one that was asked first."""
        return self.spare and not self.pinned

    @property
    def hops(self) -> int:
        """How many attempts may continue an answer."""
        # Behind reasoning a held turn is asked for again without a continuation.
        return HOPS if self.continued or self.sessions else 0

    @property
    def mended(self) -> bool:
        """Whether an answer may be whole though its provider has failed."""
        return self.fails_over or self.continued

    @property
    def lets_go(self) -> bool:
        """Whether what is held may be shown before the finish, for want of room."""
        room = {f"{STREAMS}.max_kept_bytes": ROOM, f"{GATE}.max_body_bytes": ROOM}
        # Half of it is for what is held, and an event has some 250 bytes.
        room[f"{STREAMS}.max_stream_bytes"] = 1 << 20
        return any(self.changes[name] < least for name, least in room.items())

    @property
    def quiet(self) -> float:
        """Seconds in which the reader of a stream hears something, at least a heartbeat."""
        if self.shared is not None and self.shared.events:
            return inf
        interval: float = self.changes["chat.websocket.ping_interval"]
        # The wheel's visit may be its grain late, and a heartbeat longer on its way than the last.
        return interval + 1.0 + LONGEST_WAY

    def operated(self, changes: Mapping[str, Any], *names: str) -> dict[str, Any]:
        """Return the *changes* of the configuration after the operations *names*."""
        changes = dict(changes)
        for name in names:
            if name == "reload limits":
                changes[f"{GATE}.max_connections"] = 5
                changes[f"{HTTP}.concurrent_requests"] = 2
            elif name == "reload keys":
                # The last one is no longer valid.
                if len(changes.get("auth.keys", ())) > 1:
                    changes["auth.keys"] = changes["auth.keys"][:-1]
            elif name == "reload provider":
                changes[f"{HTTP}.max_connections"] = 201
                changes[f"{HTTP}.keepalive_expiry"] = 1.0
                changes["llm.providers.sim.headers"] = {"X-New": "1"}
            elif self.grouping is not None:
                groups = {"regroup": self.grouping.changed}
                changes["llm.models"] = groups.get(name, self.grouping.models)
        return changes

    @property
    def patience(self) -> float:
        """Seconds in which a client hears something, or gives up: longer than any wait that is
        promised.
        """
        providers = 3 if self.grouping is not None else 2 if self.spare else 1
        wait = configuration.longest_wait(self.changes, providers, self.hops)
        if self.large and "slow link" in self.provider_links:
            # Nothing is heard of a whole answer before all of it has come.
            retries = self.changes[f"{configuration.HTTP}.max_retries"]
            wait += providers * (1 + retries) * LARGEST / SLOWEST
        return wait if self.shared is None else wait + ELSEWHERE


def draw(seed: int, clients: int, instances: int = 1, *, groups: bool = True) -> Plan:
    """Return the plan of *seed*, for *clients* clients of *instances* servers; without *groups*
    there are none of three providers.
    """
    dice = random.Random(f"plan {seed}")
    keys = configuration.with_tokens(seed, configuration.draw_keys(dice))
    talks, responses, sql = _draw_conversations(seed)
    changes = configuration.draw_changes(dice, keys)
    choose = random.Random(f"group {seed}").choice(("", "", *configuration.CHOICES))
    if responses == BRIDGED:
        changes["llm.providers.sim.responses"] = False
    messages = _draw_messages(seed)
    if messages:
        changes["llm.providers.sim.messages"] = MESSAGE_SETTINGS[messages["message_kinds"][0]]
    # Dice of its own: a seed without groups tries the same otherwise.
    grouping = draw_grouping(seed) if groups else None
    continued = random.Random(f"continued {seed}").random() < 0.5
    if continued:
        changes["llm.providers.sim.continuation"] = "prefill"
    talks_share = random.Random(f"talks {seed}").choice((0.0, 0.0, 0.1, 0.5))
    changes["llm.cache_losses"] = talks_share > 0
    plan = Plan(
        seed=seed,
        clients=clients,
        keys=keys,
        changes=changes,
        responses=responses,
        # Several instances of one process would wait for the locks of each other.
        sql=sql and instances == 1,
        spread=dice.choice((0.1, 5.0, 30.0)),
        faces=(*dice.sample(FACES, dice.randrange(1, len(FACES) + 1)), *talks),
        faults=_some(dice, LINK_FAULTS),
        habits=_some(dice, HABITS),
        provider_fault_share=dice.choice((0.0, 0.0, 0.1, 0.5)),
        provider_faults=tuple(dice.sample(PROVIDER_FAULTS, dice.randrange(1, 6))),
        # Half of the runs have a good network between the server and its provider.
        provider_links=_some(dice, LINK_FAULTS) if dice.random() < 0.5 else {},
        operations={name: dice.uniform(1.0, 40.0) for name in OPERATIONS if dice.random() < 0.2},
        spare=dice.random() < 0.3,
        pinned=dice.random() < 0.3,
        continued=continued,
        # Dice of its own: a seed tries the same otherwise.
        grouped=choose,
        silent=dice.choice((0.0, 0.0, 0.05)),
        # Dice of its own: a seed tries the same otherwise.
        large=random.Random(f"large {seed}").choice((0.0, 0.0, 0.1, 0.5)),
        verdicts=random.Random(f"verdicts {seed}").choice((0.0, 0.0, 0.05, 0.2)),
        calls=random.Random(f"calls {seed}").choice((0.0, 0.0, 0.1, 0.3)),
        sessions=random.Random(f"sessions {seed}").choice((0.0, 0.2, 1.0)),
        talks=talks_share,
        curious=random.Random(f"curious {seed}").choice((0.0, 0.0, 0.1, 0.3)),
        uploads=random.Random(f"uploads {seed}").choice((0.0, 0.0, 0.0, 0.0, 0.05, 0.2)),
        background=random.Random(f"background {seed}").choice((0.0, 0.0, 0.1, 0.4)),
        hurried=random.Random(f"hurry {seed}").choice((0.0, 0.0, 0.1, 0.5)),
        preambles=random.Random(f"preamble {seed}").choice((0.0, 0.3, 1.0)),
        instances=instances,
        balancer=dice.choice(BALANCERS),
        shared=_draw_shared(seed) if instances > 1 else None,
        **messages,
    )
    return plan if grouping is None else _with_grouping(plan, grouping)


def _with_grouping(plan: Plan, grouping: Grouping) -> Plan:
    """Return *plan* with the groups of *grouping*, which half of the runs change by a reload."""
    dice = random.Random(f"regroup {plan.seed}")
    changes = {"regroup": dice.uniform(1.0, 20.0), "restore groups": dice.uniform(20.0, 40.0)}
    return replace(
        plan,
        grouping=grouping,
        spare=True,
        pinned=False,
        grouped="",
        operations={**plan.operations, **(changes if dice.random() < 0.5 else {})},
    )


def _draw_conversations(seed: int) -> tuple[tuple[str, ...], str, bool]:
    """Draw the conversations of a run, what the providers do with responses, and whether there is
    a file of conversations.
    """
    dice = random.Random(f"conversations {seed}")
    count = dice.choice((0, 1, 2, 4))
    talks = tuple(dice.choice(CONVERSATIONS) for _ in range(count))
    return talks, dice.choice(RESPONSES), dice.random() < 0.5


def _draw_messages(seed: int) -> dict[str, Any]:
    """Draw who asks for messages, and what becomes of that; {}: nobody does."""
    dice = random.Random(f"messages {seed}")
    share = dice.choice((0.0, 0.0, 0.15, 0.5))
    if not share:
        return {}
    kinds = tuple(MESSAGE_SETTINGS)
    return {
        "messages": share,
        # Most are bridged.
        "message_kinds": (dice.choice((*kinds[:2], *kinds)), dice.choice(kinds)),
        "refuses": tuple(word for word in (*WORDS, RENAMED) if dice.random() < 0.3),
    }


def _draw_shared(seed: int) -> Shared:
    # Dice of its own: a seed tries the same otherwise, whether there is one instance or several.
    dice = random.Random(f"shared {seed}")
    lost, late = (
        dice.choice((0.0, 0.0, 0.01, 0.1)) if dice.random() < 0.5 else 0.0 for _ in range(2)
    )
    names = (*SERVER_EVENTS, *INSTANCE_EVENTS)
    chosen = [name for name in names if dice.random() < 0.2]
    events = [
        (dice.uniform(0.5, 40.0), name, dice.choice((0.3, 3.0, 12.0, 20.0))) for name in chosen
    ]
    # Dice of its own, again.
    dice = random.Random(f"deploys {seed}")
    moments = [dice.uniform(0.5, 40.0) for _ in range(dice.choice((0, 0, 1, 3)))]
    events += [(moment, DEPLOY, 0.0) for moment in moments]
    return Shared(
        lost=lost,
        late=late,
        links=_some(dice, PEER_FAULTS) if dice.random() < 0.5 else {},
        events=tuple(events),
        fixed=dice.random() < 0.5,
    )


def _some(dice: random.Random, names: tuple[str, ...]) -> dict[str, float]:
    """Draw some of *names*, and how often each happens: seldom, as a rule."""
    return {name: dice.choice((0.01, 0.05, 0.1, 0.3)) for name in names if dice.random() < 0.5}


def provider_dial(plan: Plan, dice: random.Random, instance: int) -> Dial:
    """Draw how *instance* connects to a provider."""
    patience = plan.changes[f"{configuration.HTTP}.connect_timeout"]
    return draw_dial(plan.provider_links, dice, owner=instance, patience=patience)

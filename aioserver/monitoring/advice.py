"""What an operator can do, by the kind of a trouble or by the error code of a rejection.

The verdict, `/stats`, the dashboard, `top` and the log show these sentences. They name settings as they
stand in `config.yaml`, and no number: the numbers stand in the texts beside them.
"""

from __future__ import annotations

# By outcome of a failed attempt.
OF_FAULTS = {
    "connect_error": "Check that {name} runs, and that its base_url leads to it.",
    "timeout": "Look at the load of {name}; if it is only slow, raise read_timeout in its http_client.",
    "http_429": "Lower requests_per_minute of {name}, or have its limits raised.",
    "http_5xx": "Look at the log of {name}, or at its status page.",
    "tls": "Check the certificate of {name}, and its base_url and ca_file.",
    "disconnected": "Look at the log of {name}, and at proxies in between that cut long answers.",
    "bad_response": "Check that the base_url of {name} leads to an API of OpenAI's form.",
}
OF_A_REFUSED_KEY = "Check the key of {name}, and the quota of its account."
OF_SILENCE = (
    "Look at the log and the load of {name}; read_timeout in its http_client ends silent answers."
)
OF_OLD_FAULTS = "Look at the log of {name}, or at its status page."
OF_A_BUG = "Look for the traceback in the log, and report it."
INSTEAD = "For now, name another provider in llm.fallbacks or llm.active, and reload (SIGHUP)."

_MORE_PLACES = (
    "If the provider can answer more at once, raise its concurrent_requests;"
    " else name another one in llm.fallbacks."
)
# Where connections wait for the server, and requests of those inside for a provider.
OF_A_FULL_PROVIDER = (
    "If {name} can answer more at once, raise its concurrent_requests;"
    " more connections would only wait for it."
)
_MORE_CONNECTIONS = (
    "If the log says that no file descriptor is free, raise the limit of open files;"
    " else raise max_connections in the http_client of the provider."
)
_OWN_LIMITS = "The log names the caller; its limits stand in auth.keys."
# By error code of a rejection: why requests were rejected, and what to do.
OF_REJECTIONS = {
    "circuit_open": (
        "a provider is dead, and is left alone",
        "Look at its log, or at its status page.",
    ),
    "concurrency_exceeded": ("a client has as many answers as it may", _OWN_LIMITS),
    "history_unavailable": (
        "conversations cannot be deleted now",
        "The log says what is wrong with the storage of conversations.",
    ),
    "no_provider": (
        "no provider can be asked",
        "`aioserver check` says which provider lacks its key; the log says which refuses it.",
    ),
    "pool_timeout": (
        "no connection of a provider was free in time",
        _MORE_CONNECTIONS,
    ),
    "provider_queue_full": ("the queue of a provider is full", _MORE_PLACES),
    "provider_queue_timeout": ("requests waited too long for a provider", _MORE_PLACES),
    "provider_rate_limited": (
        "a provider limits our rate",
        "Have its limits raised, or name another provider in llm.fallbacks.",
    ),
    "rate_limit_exceeded": ("a client asks more often than it may", _OWN_LIMITS),
    "server_at_capacity": (
        "the server is full",
        "If the machine has room, raise max_connections in chat.websocket.concurrency.",
    ),
    "server_shutdown": ("the server stops", ""),
}


def of_rejections(code: str) -> tuple[str, str]:
    """Return why requests are rejected with *code*, with the code, and what to do."""
    reason, advice = OF_REJECTIONS.get(code, ("", ""))
    return (f"{reason} ({code})" if reason else code), advice

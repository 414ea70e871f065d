"""The bridge: Anthropic's Messages over a provider that has chat completions only.

Bytes in, bytes out; the code that it shares with other bridges is in protocol/bridging/.

In the order in which a request meets them:

    request    the body of `/v1/messages` becomes that of `/v1/chat/completions`: a `ChatRequest`
    blocks     its messages, block by block, become those of a chat
    tools      its tools become functions
    ids        the ids of calls, which the API writes with fewer characters than engines do
    events     the chunks of a streamed answer become the events of a message
    arguments  where the arguments of a call end
    whole      a whole answer becomes a whole message

Unread values stay bytes. A request is refused if it has a field without a form in chat completions
which its answer would need; the error names the field.
"""

"""The bridge: OpenAI's Responses API over a provider that has chat completions only.

Bytes in, bytes out; the code that it shares with other bridges is in protocol/bridging/.

In the order in which a request meets them:

    request    the body of `/v1/responses` becomes that of `/v1/chat/completions`: a `ChatRequest`
    items      its input items become messages
    tools      its tools become functions, and the choice of one becomes that of a function
    events     the chunks of a streamed answer become the events of a response
    whole      a whole answer becomes a whole response
    output     the output items, while they grow: messages, reasoning, calls of tools; and the
               response object around them

Unread values stay bytes: an instruction of megabytes is neither parsed nor written anew. A request
is refused if it has a field without a form in chat completions; the error names the field.
"""

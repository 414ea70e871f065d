"""`aioserver chat`: a chat in a terminal, or one question in a pipe, over the client library.

- `command` is the command line, and decides between a **dialog**, which asks until the person leaves, and a **single
  question** with a single answer, whose exit code a script can use.
- `question` is what is asked: the words of the command line, and stdin where that is no terminal. `dialog` reads questions from
  a person, line by line, and knows the few `/commands`.
- `history` is the part of the conversation that is sent with a question, where the server does not keep it.
- `asking` sends a question, and shows what comes: the queue and the waiting on the **status** line, the text on a
  **display**.
- `display` writes text as it comes. `markdown` is the display that draws Markdown with rich, an optional package: `blocks` cuts
  the text into blocks that later text cannot change, so that each is drawn once.
- `interrupts` turns signals into the end of an answer, or of the program.
- `safe_text` takes out of a text what a terminal would obey instead of show.

Stdout gets the answers and nothing else; everything else goes to stderr.
"""

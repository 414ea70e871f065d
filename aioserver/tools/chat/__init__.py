"""`aioserver chat`: a chat in a terminal, or one question in a pipe, over the client library.

- `command` is the command line, and decides between a **dialog**, which asks until the person
  leaves, and a **single question** with a single answer, whose exit code a script can use.
- `dialog` reads questions from a person, line by line, and knows the few `/commands`.
- `asking` sends a question, and shows what comes on a **display**. A question is the words of the
  command line, and stdin where that is no terminal; the **history** is the part of the
  conversation that is sent with it, where the server does not keep it. **Interrupts** are signals
  that end an answer, or the program.
- `display` writes text as it comes. `markdown` is the display that draws with rich, an optional
  package: Markdown in **blocks** that later text cannot change, so that each is drawn once, and
  below it a line with what is waited for. Of any text, what a terminal would obey instead of show
  is taken out.

Stdout gets the answers and nothing else; everything else goes to stderr.
"""

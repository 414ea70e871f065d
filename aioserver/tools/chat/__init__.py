"""`aioserver chat`: a chat in a terminal, or one question in a pipe, over the client library.

- `command` is the command line, and decides between a **dialog**, which asks until the person
  leaves, and a **single question** with a single answer, whose exit code a script can use. Such a
  question is the words of the command line, and stdin where that is no terminal.
- `dialog` reads questions from a person, line by line, and knows the few `/commands`.
- `asking` has the **chat**: the server, and the conversation, which the server keeps, or the chat
  itself. It sends a question, and shows the answer on a **display**. **Interrupts** are signals
  that end an answer, or the program.
- `display` writes text as it comes. `markdown` is the display that draws with rich, an optional
  package. It prints each **block** of Markdown once, when later text cannot change it any more, and
  draws below it the last block and a line with the current wait. Control functions that a terminal
  would obey are removed from any text.

Stdout gets the answers and nothing else; everything else goes to stderr.
"""

"""`aioserver completion`: the script by which a shell completes the command line of aioserver."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from aioserver.commands import options

# The variable by which such a script asks for completions; click derives the same name from that
# of the program.
VARIABLE = "_AIOSERVER_COMPLETE"
SHELLS = ("bash", "zsh", "fish")


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
@options.version
@click.pass_context
def command(context: click.Context, shell: str) -> int:
    r"""Print the script that completes commands in a shell.

    Put one of these lines into the file that the shell reads at its start:

    \b
      ~/.bashrc                   eval "$(aioserver completion bash)"
      ~/.zshrc, after compinit    eval "$(aioserver completion zsh)"
      ~/.config/fish/config.fish  aioserver completion fish | source
    """
    make = get_completion_class(shell)
    assert make is not None, "click knows these shells"
    print(make(context.find_root().command, {}, "aioserver", VARIABLE).source())
    return 0

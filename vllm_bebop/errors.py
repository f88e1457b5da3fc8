"""What tells a user's error, which the `bebop` command says in one line, from a fault, which keeps its traceback."""


class UserError(ValueError):
    """A request, file or setting that is refused. The message names it, and the remedy."""

"""The command `hetegen`: finds out what is asked for, and loads no more than that needs."""

import sys
from collections.abc import Sequence

from hetegen_rec.verbs import SCORING_VERBS


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] and given[0] in SCORING_VERBS:
        from hetegen_rec import scoring_cli

        return scoring_cli.main(given)
    from hetegen_rec._stack import StackError, check_stack, installed_stack

    try:
        check_stack(installed_stack())
    except StackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from hetegen_rec import cli

    return cli.main(given)


if __name__ == "__main__":
    sys.exit(main())

"""The nearest command or option for one that is not there."""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperGroup

from csqcli.errors import UserError, did_you_mean


class Commands(TyperGroup):
    """Commands by name. UserError for one that is not there, with the nearest."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None and not ctx.resilient_parsing:
            shown = [name for name, command in self.commands.items() if not command.hidden]
            hint = did_you_mean(args[0], shown) or f"see `{ctx.command_path} --help`"
            raise UserError(f"no command `{args[0]}`", where=_where(ctx), hint=hint)
        return super().resolve_command(ctx, args)


def no_such_option(name: str, context: Any) -> UserError:
    """For an option that the command of a click context does not have."""
    known = {option for parameter in context.command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    names = [option.removeprefix("--") for option in known if option.startswith("--")]
    likely = re.sub("`(.+?)`", r"`--\1`", did_you_mean(name.lstrip("-"), names))
    hint = likely or f"see `{context.command_path} --help`"
    return UserError(f"no option `{name}`", where=_where(context), hint=hint)


def _where(context: Any) -> str:
    """``csq search``; nothing where it is csq itself."""
    return context.command_path if " " in context.command_path else ""

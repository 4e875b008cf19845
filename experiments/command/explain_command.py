"""``eraselab explain``: what the fields of a choice mean."""

import textwrap
from typing import Annotated

import typer

WIDTH = 100


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(explain)


def explain(
    choice: Annotated[str | None, typer.Argument(help="A choice as eraser=esd, a group as eraser, or job.")] = None,
) -> None:
    """Explain a choice: each field with its default, meaning, allowed values and where the default comes from."""
    from experiments.command.explaining import choices, explain_choice, explain_job, groups  # noqa: PLC0415

    if choice is None:
        print(f"Groups of choices: {', '.join(groups())}.")
        print("eraselab explain GROUP lists a group's choices, eraselab explain GROUP=CHOICE explains one,")
        print("eraselab explain job the fields that belong to none.")
        return
    if "=" not in choice and choice != "job":
        listed = choices(choice)
        width = max(map(len, listed), default=0)
        for name, comment in listed.items():
            print(f"{name:<{width}}  {comment}".rstrip())
        return
    explained = explain_job() if choice == "job" else explain_choice(choice)
    print(f"{explained.choice}{f'   {explained.target}' if explained.target else ''}")
    for text in (explained.comment, explained.about):
        if text:
            print(f"\n{text}")
    for field in explained.fields:
        print(f"\n{field.typed}   default {field.default}")
        told = (("", field.meaning), ("Allowed: ", field.allowed), ("Source: ", field.source))
        for label, text in told:
            if text:
                print(textwrap.fill(f"{label}{text}", WIDTH, initial_indent="    ", subsequent_indent="    "))

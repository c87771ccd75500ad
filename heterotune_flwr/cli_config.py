"""``heterotune config``: the presets, what a run's settings are in the end, and what each of them means."""

from __future__ import annotations

from typing import Annotated

import typer

from heterotune_flwr.completion import presets


def config(
    name: Annotated[
        str | None,
        typer.Argument(
            help="preset or YAML file; without one, all presets are listed", autocompletion=presets
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="dotted overrides, like train.learning_rate=1e-3")
    ] = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="what settings mean: all, or those named: --explain train, --explain data.max_length",
        ),
    ] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="with --explain: the page docs/settings.md")
    ] = False,
) -> None:
    """List the presets, show a fully resolved configuration, or explain settings.

    With --explain the words after it are settings or sections: their values, default, unit and meaning.
    """
    if explain or markdown:
        _explain([*([name] if name else []), *(overrides or [])], markdown)
        return
    from heterotune_flwr.config.compose import compose, to_yaml
    from heterotune_flwr.config.shipped import describe_presets

    if name is None:
        for preset, purpose in describe_presets().items():
            typer.echo(f"{preset:12} {purpose}")
        return
    typer.echo(to_yaml(compose(name, overrides or [])))


def _explain(keys: list[str], markdown: bool) -> None:
    from heterotune_flwr.settings import find, sections
    from heterotune_flwr.settings_page import lines, page

    if markdown:
        typer.echo(page(), nl=False)
        return
    found = [section for key in keys for section in find(key)] if keys else sections()
    for line in lines(found):
        typer.echo(line)

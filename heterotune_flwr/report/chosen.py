"""Who chose which setting, and what protects whom by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from heterotune_flwr.config.plain import flatten
from heterotune_flwr.jsons import as_list, as_mapping, as_number, as_whole
from heterotune_flwr.report.facts import Protection, SettingFact
from heterotune_flwr.report.files import RunFiles
from heterotune_flwr.report.identity import was_simulated
from heterotune_flwr.schema import Config, TypeConfig


def settings(files: RunFiles) -> tuple[str, list[SettingFact]]:
    """The preset that the run was made from, and every setting with its origin; of strategies those compared."""
    told = files.of("settings")
    said = {str(path) for event in told for path in as_list(event.get("said"))}
    preset = str(told[0].get("preset") or "") if told else ""
    known = _known(files)
    found = []
    for path, value in _flat(files):
        default, text = known.get(path, (None, ""))
        if not told:
            origin = "unknown"
        elif any(path == own or path.startswith(f"{own}.") for own in said):
            origin = "user"
        else:
            origin = "default" if path in known and value == default else "preset"
        found.append(SettingFact(path, value, default, origin, text))
    return preset, found


def _known(files: RunFiles) -> dict[str, tuple[Any, str]]:
    """Path -> the program's own value and its sentence of help."""
    parts: dict[str, Any] = {
        name: part for name, part in vars(Config()).items() if is_dataclass(part)
    }
    blank = TypeConfig(backbone="")
    parts |= {f"types.{number}": blank for number in range(len(as_list(files.config.get("types"))))}
    return {
        f"{where}.{field.name}": (getattr(part, field.name), str(field.metadata.get("help", "")))
        for where, part in parts.items()
        for field in fields(part)
    }


def _flat(files: RunFiles) -> list[tuple[str, Any]]:
    """Dotted paths, those of types by their number; where the run lies is none of its settings."""
    types = {str(n): entry for n, entry in enumerate(as_list(files.config.get("types")))}
    compared = as_list(files.section("run").get("compare"))
    chosen = {n: spec for n, spec in files.section("strategies").items() if n in compared}
    config = {**files.config, "types": types, "strategies": chosen}
    return [
        (str(path), value) for path, value in flatten(config) if path != "run.dir" and value != {}
    ]


def protections(files: RunFiles) -> list[Protection]:
    """What stands between clients, server and each other in this run, as plain sentences."""
    simulated = was_simulated(files)
    deployed = None if simulated is None else not simulated
    return [*_of_server(files), *_of_nodes(files, deployed)]


def _of_server(files: RunFiles) -> list[Protection]:
    server = files.section("server")
    if not server:
        return []
    limit, ceiling = as_number(server.get("norm_limit")), as_number(server.get("norm_ceiling"))
    bounds = [
        f"{limit:g} times longer than usual ones" if limit else "",
        f"{ceiling:g} times longer than local training can go" if ceiling else "",
    ]
    long = " or ".join(filter(None, bounds))
    patience, least = as_whole(server.get("cooldown_after")), as_whole(server.get("min_results"), 1)
    robust = {
        name: as_mapping(spec)["robust"]
        for name, spec in files.section("strategies").items()
        if as_mapping(spec).get("robust")
    }
    rules = ", ".join(
        f"{name}: {rule.get('rule') if isinstance(rule, Mapping) else rule}"
        for name, rule in robust.items()
    )
    return [
        Protection(
            "update gate",
            "the shared model from single clients",
            True,
            "Updates with numbers that are none, of a wrong form"
            + (
                f", or {long}, are refused."
                if long
                else " are refused; their length is not checked."
            ),
        ),
        Protection(
            "cooldown",
            "a run from clients that keep failing",
            patience > 0,
            f"After {patience} failures in a row a client is not asked for a while."
            if patience
            else "Clients that fail are asked again in every round (server.cooldown_after=0).",
        ),
        Protection(
            "fewest updates",
            "everybody from what a few decide",
            least > 1,
            f"A round with fewer than {least} usable updates is skipped."
            if least > 1
            else "One usable update is enough for a round (server.min_results=1): a few may decide for all.",
        ),
        Protection(
            "robust mean",
            "a type from some of its clients that lie",
            bool(robust),
            f"Updates inside a type are combined by a robust rule ({rules})."
            if robust
            else "Updates inside a type are averaged as they are: the gate alone stands against clients that lie.",
        ),
    ]


def _of_nodes(files: RunFiles, deployed: bool | None) -> list[Protection]:
    sums = any("statistics" in as_mapping(spec) for spec in files.section("strategies").values())
    if deployed is False:
        floors = (
            "This was a simulation: all clients are one machine's, and none holds anything back."
        )
        consent = "In a simulation clients tell their classes' sums where a strategy asks."
        link = "This was a simulation: nothing crossed a network."
    else:
        floors = (
            "Each node's owner sets floors in its node.toml: what goes below them is refused by the node itself. The "
            "run's files do not hold them."
        )
        consent = "Counts and sums of a node's classes leave it only where its owner says class-sums = yes."
        link = "Messages travel by TLS where the server was set up by heterotune deploy; the run's files do not say."
    found = [
        Protection("floors", "a node's examples from the server", deployed, floors),
        Protection(
            "details",
            "a node's examples from the server",
            deployed,
            _DETAILS[deployed is not False],
        ),
        Protection(
            "encrypted link",
            "messages from the network",
            None if deployed is not False else False,
            link,
        ),
    ]
    if sums:
        found.insert(
            1, Protection("class sums", "a node's examples from the server", deployed, consent)
        )
    return found


#: By whether nodes are somebody's own.
_DETAILS = {
    True: "Label mixes, mistaken labels and answers leave a node only where its owner says details = yes.",
    False: "In a simulation clients tell label mixes, mistaken labels and some answers, for this report.",
}

"""Hostile, lost and killed; a deployment under fire."""

from __future__ import annotations

from benchmarks.report.sections import bullets, load_results, said, section, shown, table

FAULTS = {
    "nan": "one NaN", "inf": "all infinite", "times_1e8": "all numbers x 1e8", "flip_x10": "sign flip x 10",
    "zero": "zero update", "missing_key": "a tensor is missing", "extra_key": "a tensor too many",
    "wrong_dtype": "wrong dtype on the wire", "weight_1e12": "examples = 1e12", "weight_negative": "examples = -48",
    "weight_nan": "examples = NaN", "stale_round": "answer to the round before",
    "replay": "first update again, new round number", "truncated": "half of the bytes",
    "oversize_shape": "2^50 numbers declared", "bomb": "a few bytes that claim 2^42 numbers",
    "wrong_type": "another type tag", "wrong_code": "another code hash",
}  # fmt: skip


def faults() -> str:
    """Every fault on every strategy."""
    known, lost = load_results("faults"), load_results("dropout")
    rows = [
        (FAULTS.get(name, name.replace("_", " ")), row["cases"], row["survived"], row["detected"],
         f"{row['max_loss_gap_percent']:.1f} %")
        for name, row in known["by_fault"].items()
    ]  # fmt: skip
    gone = [row for row in lost["rows"] if row["lost"] == 0.3]
    return section(
        "Clients that send garbage, or nothing",
        shown(
            f"{known['hostile']} hostile clients of {known['clients']}, toy clients on the real wire, "
            f"{known['strategies']} strategies, {known['rounds']} rounds: {known['cases']} cases, {known['survived']} "
            "survived with finite tensors. The gap is the honest clients' final loss against the same run in which "
            "the two answer with an error. A zero update cannot be told from an honest client with nothing to learn: "
            "it only shortens the common step.",
            "reliability.faults",
            table(("fault", "cases", "survived", "refused", "largest loss gap"), rows),
        ),
        shown(
            f"{lost['clients']} toy clients of three types, HeteroTune, {lost['rounds']} rounds, {len(lost['seeds'])} "
            "seeds: what silently lost training messages cost.",
            "reliability.dropout",
            table(("lost", "outcome", "final loss above the lossless run's"), [
                ("30 % in every round", f"{len(gone)} of {len(gone)} runs finish",
                 f"{lost['loss_gap_percent_30']:.1f} % (worst seed {lost['loss_gap_percent_30_worst']:.1f} %)"),
                ("90 % in two rounds, `min_results=20`", f"{lost['skipped_90_for_2_rounds']} rounds skipped",
                 f"{lost['loss_gap_percent_90_for_2_rounds']:.1f} %"),
                ("90 % for ever", f"{lost['status_90_for_ever']}: \"{lost['reason_90_for_ever']}\"", ""),
            ]),
        ),
    )  # fmt: skip


def attacks() -> str:
    """Lies that keep to the form."""
    known = load_results("attacks")
    drops, run = known["run"]["drops"], known["run"]
    names = {
        "weight": "a million examples declared, update turned round",
        "sums": "a million examples declared, class means shifted",
        "predictions": "predictions that are sure and wrong",
        "weight_adaptive": "the first, by who knows the bounds", "sums_adaptive": "the second, by who knows the bounds",
    }  # fmt: skip
    rows = [
        (told, f"{drops[name]['points']:.1f}", ", ".join(f"{value:.1f}" for value in drops[name]["worst_by_seed"]),
         ", ".join(f"`{flag}`" for flag in run["flags"].get(name, [])) or "nobody")
        for name, told in names.items()
    ]  # fmt: skip
    doors = [
        ("none" if rule == "mean" else f"`{rule}`", *(f"{row[key]:.1f}" for key in ("with", "without", "accuracy")))
        for rule, row in run["backdoor"].items()
    ]  # fmt: skip
    labels, texts = known["labels_asked"], known["texts_asked"]
    seeds = ", ".join(map(str, known["seeds"]))
    return section(
        "Attackers",
        shown(
            f"One lying client of {run['clients']}, embedded family, {run['rounds']} rounds, seeds {seeds}: points of "
            "accuracy that the worst type loses, mean and by seed, and what the journal says. Where nobody lies the "
            f"bounds cost {run['costs']['cost']:.2f} points, and {run['costs']['cost_uneven']:.2f} where honest "
            f"clients differ in size. {known['fatal_lies']} of {known['roster']['lies']} lies before the first round "
            f"end a run; wrong alignment factors cost {known['factor_drop_points_after_leaving']:.1f} points after the "
            "liar has left.",
            "reliability.attacks --only run roster",
            table(("lie", "points lost", "by seed", "noticed as"), rows),
        ),
        shown(
            f"A backdoor: two clients of {run['clients']}, half of whose texts carry a trigger and one label. Share "
            "(%) of test texts of other classes that get this label from honest clients' models after "
            f"{run['backdoor_rounds']} rounds, with robust means inside the type beside none. Nothing here sees such "
            "clients.",
            "reliability.attacks --only run",
            table(("`robust`", "with the trigger", "without", "accuracy"), doors),
        ),
        shown(
            "A server against one node with the strictest settings, three nodes (in brackets of how many). The last "
            "two stay inside all floors: only noise or a secure sum would bound them.",
            "reliability.attacks --only node",
            table(("attack", "with floors"), [
                ("environment variables read, six ways", known["env_leak"]),
                ("labels, by a test of one record", f"{known['labels_read']} ({labels})"),
                ("texts ranked first of 2,000, by a step on one record", f"{known['texts_ranked_first']} ({texts})"),
                ("labels of known held-out texts, by differences of the mean loss (17 tests each)",
                 f"{known['labels_read_adaptive']} ({labels})"),
                ("texts that were trained on ranked first of 2,000, by the span of 12 rounds' gradients (batch 8)",
                 f"{known['texts_ranked_first_adaptive']} ({texts})"),
            ]),
        ),
    )  # fmt: skip


def killed() -> str:
    """SIGKILL and resume; fuzzing."""
    known, fuzz = load_results("resume"), load_results("codec")
    rows = [(place, count, sum(r["bit_equal"] for r in known["rows"] if r["where"] == place and r["killed"]))
            for place, count in known["by_place"].items()]  # fmt: skip
    return section(
        "Killed, and resumed",
        shown(
            "SIGKILL at random moments and inside random writes of files, in one process and in Flower's simulation; "
            f"then `--resume`. {known['kills']} kills, {known['bit_equal']} runs that ended with the undisturbed run's "
            "bank, bit for bit.",
            "reliability.resume",
            table(("killed", "times", "bank equal, bit for bit"), rows),
        ),
        said(f"Coverage-guided fuzzing of everything that reads a stranger's bytes (`python -m "
        f"benchmarks.reliability.fuzz_exchange`): {fuzz['fuzz_inputs']:,} inputs, {fuzz['fuzz_accepted']:,} of them "
        f"accepted, the memory of {fuzz['fuzz_measured']:,} measured, {fuzz['fuzz_findings'] or 'no'} finding."),
    )  # fmt: skip


def deployment() -> str:
    """Refusals, equality, deaths, half an hour under fire."""
    known = load_results("deployment")
    moments = ("idle", "train", "upload", "aggregate")
    rows = []
    for what in dict.fromkeys(row["what"] for row in known["kills"].values()):
        cells = []
        for when in moments:
            row = known["kills"].get(f"{what}-{when}", {})
            seconds = row.get("next_round_s")
            cells.append(
                ""
                if not row.get("killed") or seconds is None
                else f"{seconds}{'*' * bool(row['resumed'])}"
            )
        rows.append((what, *cells))
    fire = ", ".join(
        f"{what} {count}" for what, count in sorted(known["soak_kills_by_process"].items())
    )
    calm = known["rss_growth_in_calm_percent"]
    return section(
        "A deployment",
        "SuperLink, SuperExec, nginx and three nodes over TLS with a key per node, all on one busy machine.",
        bullets(
            f"{known['refused']} of {known['refusal_cases']} cases that must not get in were refused, in the right "
            "words (`python -m benchmarks.deployment.kills`).",
            "The final bank equals that of the simulation of the same clients: greatest difference "
            f"{known['sim_equals_deploy']:.1f} with tiny backbones, {known['sim_equals_deploy_real']:.1f} with "
            f"{', '.join(known['sim_equals_deploy_real_types'])} (`python -m benchmarks.deployment.equality`).",
        ),
        shown(
            "SIGKILL of one process, restarted as the units would: seconds from the death to the next finished round; "
            f"* after `--resume`; empty: none lives then. One try per case. {known['completed']} of "
            f"{known['kill_cases']} runs ended with every round once and no answer counted twice; the worst next round "
            f"came after {known['kill_next_round_s_worst']} s.",
            "deployment.kills",
            table(("dies", *moments), rows),
        ),
        shown(
            f"{known['soak_minutes']:.0f} minutes with a random death about every 30 s ({fire}), then "
            f"{known['soak_calm_minutes']:.0f} calm ones. Memory is compared at equal age under fire, by a line "
            "through the calm.",
            "deployment.soak",
            table(("of the run", "number"), [
                ("deaths", known["soak_kills"]),
                ("rounds", known["soak_rounds"]),
                ("rounds lost", known["soak_lost_rounds"]),
                ("faults in the journal", len(known["soak_journal_faults"])), ("resumed", known["soak_resumes"]),
                ("messages failed", known["soak_failed_messages"]),
                ("memory under fire, last third against first, largest by process",
                 f"{max(known['rss_growth_under_fire_percent'].values()):+.1f} %"),
                ("memory in the calm, largest by process", f"{max(calm.values()):+.2f} %"),
            ]),
        ),
    )  # fmt: skip


SECTIONS = (faults, attacks, killed, deployment)

"""Memory, seconds and bytes."""

from __future__ import annotations

from benchmarks.report.sections import load_results, number, said, section, shown, table, told_gain


def _step(name: str) -> str:
    told = {"lora32": "LoRA r=32", "kept": "kept states", ".": ", ", "_": " "}
    for word, shown_as in told.items():
        name = name.replace(word, shown_as)
    return name


def memory() -> str:
    """Peak memory of a step on a CPU."""
    known = load_results("memory")
    rows, more = [], []
    for bits, steps in known["steps"].items():
        lora, ours = steps["lora32"], steps["last_slot"]
        rows.append((
            bits, f"{lora['peak_mb']:,.0f} MB", f"{ours['peak_mb']:,.0f} MB", f"**{ours['ratio']:.2f}**",
            f"{lora['weights_mb']:.0f} + {lora['live_mb']:,.0f}; {ours['weights_mb']:.0f} + {ours['live_mb']:.0f} MB",
            f"{lora['seconds']:.1f} / {ours['seconds']:.1f}",
        ))  # fmt: skip
        more += [
            (_step(name), f"{row['peak_mb']:,.0f} MB", f"{row['ratio']:.2f}",
             f"{row['live_mb']:,.0f} MB", f"{row['seconds']:.1f}")
            for name, row in (steps.items() if len(steps) > 2 else ())
        ]  # fmt: skip
    shared = [
        (bits, f"{row['ratio']:.2f}", f"{row['files_only']:.2f}", f"{row['anonymous_mb']:.1f} MB",
         f"{row['one_copy_mb']:.0f} MB")
        for bits, row in known["shared_weights"].items()
    ]  # fmt: skip
    return section(
        "Memory of a client on a CPU",
        shown(
            "Peak of one training step: 2 sequences of 512 tokens with a loss at every position, SmolLM2-135M, "
            "gradient checkpointing, medians of 5. HeteroTune (last slot, the backbone runs in this step) against LoRA "
            "r=32 as FlowerTune LLM trains it. Peaks are resident bytes above a process that has loaded "
            "nothing. Both sides run with our loading code, so that only the methods differ.",
            "speed.memory",
            table(("bits", "peak, LoRA", "peak, HeteroTune", "ratio", "weights + tensors, LoRA; HeteroTune",
                   "s per step"), rows),
        ),
        shown(
            "Where it goes at 4 bits, for the last, the upper half of and all four slots. Ratios are to LoRA r=32, "
            "with or without checkpointing alike. Seconds were taken beside other work.",
            "speed.memory",
            table(("trained slots", "peak", "ratio", "tensors beside the weights", "s per step"), more),
        ),
        shown(
            "Four processes on one machine hold so many copies of SmolLM2 together. First with everything that a "
            "process without the model does not have, then of the mapped files alone. The aim of 1.2 is missed at "
            "int8, by buffers that its first product allocates.",
            "speed.shared_weights",
            table(("bits", "copies", "files alone", "per process beside", "one copy"), shared),
        ),
    )  # fmt: skip


def gpu() -> str:
    """Peak memory of a step on a GPU."""
    known = load_results("gpu")
    rows = []
    for shape, bits in ((shape, bits) for shape, found in known["steps"].items() for bits in found):
        step = known["steps"][shape][bits]
        for batch in (2, 16):
            lora, small, last, every = (
                step[f"{batch}.{name}"] for name in ("lora16", "lora32", "last_slot", "all_slots")
            )
            rows.append((
                f"{shape}, {bits}, {batch} sequences ({step['weights_mb'] / 1e3:.2f} GB of weights)",
                f"{lora['peak_mb'] / 1e3:.2f}", f"{small['peak_mb'] / 1e3:.2f}",
                f"{last['peak_mb'] / 1e3:.2f} (**{last['peak_ratio_lora16']:.2f}**)",
                f"{every['peak_mb'] / 1e3:.2f} ({every['peak_ratio_lora16']:.2f})",
                " / ".join(f"{one['seconds']:.2f}" for one in (lora, last, step[f"{batch}.last_slot.kept"])),
            ))  # fmt: skip
    return section(
        "Memory of a client on a GPU",
        shown(
            f"{known['gpu']}, torch {known['torch']}, medians of {known['runs']}. Shapes of published models, random "
            "weights; sequences of 512 tokens with a loss at every position, gradient checkpointing. GB that PyTorch "
            "had allocated at most, weights included; in brackets the share of LoRA r=16 on all linear layers. Last "
            "column: seconds per step of LoRA r=16, the last slot, and the last slot from kept states (the 135M rows "
            "beside other work). Half of LoRA's memory is missed where weights are nearly all there is.",
            "speed.gpu",
            table(("shape", "LoRA r=16", "LoRA r=32, as FlowerTune", "HeteroTune, last slot", "all four slots",
                   "s per step"), rows),
        ),
    )  # fmt: skip


_RUNS = {
    "heterotune.kept": "HeteroTune, kept states",
    "heterotune": "HeteroTune, nothing kept",
    "fedit": "LoRA r=16 (FedIT)",
}


def gpu_federated() -> str:
    """Whole runs on one GPU, or that there were none."""
    title, known = "A federated run on a GPU", load_results("gpu_federated")
    models = "Whole runs of three clients with models shaped like Llama-3.2-1B, 3.2-3B and 3.1-8B, random weights"
    if not known:
        return section(title, said(
            f"Not run on a GPU. {models}, HeteroTune against LoRA r=16: `python -m benchmarks.speed.gpu --federated` "
            "makes the table in minutes on a GPU of 80 GB. What it runs is tested at toy size on a CPU."
        ))  # fmt: skip
    rows = []
    for name, costs in known.get("runs", {}).items():
        bits, row = name.split(".", 1)
        for shape, one in costs.items():
            weights = known["weights_gb"][bits][shape]
            rows.append((
                f"{shape}, {bits} ({weights:.1f} GB of weights)", _RUNS[row],
                " / ".join(f"{seconds:.1f}" for seconds in one["seconds"]), f"{one['peak_gb']:.2f}",
                f"{one['kb_down']:,.0f}, {one['kb_up']:,.0f}",
            ))  # fmt: skip
    apart = max(known.get("aggregation", {}).values(), default=None)
    step = (
        "" if apart is None else
        f" The server's step, which a CPU takes, differs from its formula in float64 on the GPU by {apart:.1g} of its "
        "length at most."
    )  # fmt: skip
    parts = [shown(
        f"{models} and one tokenizer. {known['device']}, torch {known['torch']}; open text, {known['rounds']} rounds "
        f"of {known['steps']} steps of {known['batch']} sequences of {known['length']} tokens, each client in a "
        "process of its own. Seconds of every client-round from message to reply: HeteroTune reads its states and "
        "writes public answers in the first and fits predictions in the last. GB that PyTorch had allocated at "
        f"most.{step}",
        "speed.gpu",
        table(("model", "row", "s, by round", "peak GB", "kB down, up"), sorted(rows)),
    )]  # fmt: skip
    if embedded := known.get("embedded"):
        parts.append(shown(
            f"The demonstration, HeteroTune alone, 1,500 anchors, {known['rounds']} rounds, on the GPU and on its "
            "machine's CPU: accuracies, and how far clients and banks are apart. Equal: at most 1 point, mean over "
            "clients.",
            "speed.gpu",
            table(("bits", "CPU", "GPU", "points apart, mean", "at most", "bank, relative"), [
                (bits if row["same"] else f"{bits}, not equal", row["accuracy_cpu"], row["accuracy_gpu"],
                 row["mean_points"], row["largest_points"], f"{row['bank']:.2g}")
                for bits, row in embedded.items()
            ]),
        ))  # fmt: skip
    return section(title, *parts)


def client_speed() -> str:
    """Kept states, warm worker."""
    known = load_results("client_speed")
    kept = known["prefix_cache"]
    rows = [
        (told, number(kept[f"{name}.full"], "seconds", 3), number(kept[f"{name}.kept"], "seconds", 4),
         f"**{known[f'prefix_cache_speedup_{name}']:.3g} x**", f"{kept[f'{name}.full']['peak_mb']:.0f} MB",
         f"{kept[f'{name}.kept']['peak_mb']:.0f} MB")
        for name, told in (("last_slot", "last"), ("upper_half", "upper half"), ("all_slots", "all"))
    ]  # fmt: skip
    worker = known["warm_worker"]
    return section(
        "Speed of a client",
        shown(
            "Kept states: seconds per step of 16 texts, SmolLM2-135M at 4 bits, four slots, and peak memory.",
            "speed.client_speed",
            table(("trained slots", "s, whole model", "s, kept states", "faster", "peak, whole model",
                   "peak, kept states"),
                  rows),
        ),
        shown(
            "A deployed node, from the start of the process that Flower makes for a message to its first training "
            f"step, {worker['type']}, medians of {worker['messages']}.",
            "speed.warm_worker",
            table(("messages go to", "seconds", "times the backbone was loaded"), [
                ("a fresh load for every message", number(known, "cold_first_step_seconds", 2),
                 worker["cold_backbone_loads"]),
                ("warm worker", f"{known['warm_first_step_seconds']:.2f}, "
                 f"**{known['warm_first_step_speedup']:.1f} times sooner**", known["worker_backbone_loads"]),
            ]),
        ),
    )  # fmt: skip


def codecs() -> str:
    """Bytes on the wire."""
    known = load_results("codec")
    names = {
        "bf16": "`bf16` (default)", "int8": "`int8`", "tiny": "`tiny` (= `nf4`)",
        "tiny_no_feedback": "`tiny`, no error feedback", "topk": "`topk` (0.1 up, bf16 down)",
        "topk_no_feedback": "`topk`, no error feedback",
    }  # fmt: skip
    rows = []
    for name, told in names.items():
        row = known["settings"][name]
        loss = row.get("loss_against_bf16")
        rows.append((
            told, f"{row['bytes_down'] / 1e3:.1f}, {row['bytes_up'] / 1e3:.1f}",
            f"{row['open_text_bytes_down'] / 1e3:.1f}, {row['open_text_bytes_up'] / 1e3:.1f}",
            f"{row['accuracy']:.2f} ± {row['accuracy.std']:.2f}",
            told_gain(loss) if loss else "",
        ))  # fmt: skip
    return section(
        "Bytes of a round by codec",
        shown(
            "The demonstration's 12 clients of three types, 30 rounds, the bank alone, seeds 20 to 22. Bytes of "
            "messages' contents per client-round; *open text*: the bank with output by vocabulary (25,059 numbers "
            "instead of 14,307). Loss: accuracy of bf16 minus the row's, paired. Sending only what changed costs "
            f"{known['resend_ms']:.2f} ms a message.",
            "speed.codec",
            table(("codec", "down, up (kB)", "open text: down, up (kB)", "accuracy", "loss"), rows),
        ),
    )  # fmt: skip


def scale() -> str:
    """Many clients."""
    known = load_results("scale")
    over, memory = known["overhead_ms"], known["pss_mb"]
    return section(
        "A thousand virtual clients",
        shown(
            f"Two quiet cores ({known['machine']}), three embedded types, a tenth of the clients a round. Aggregating "
            f"{known['agg_updates']:,} updates of {known['agg_numbers']:,} numbers takes {known['agg_10k_s']:.1f} s "
            f"beside their arrival, with {known['agg_10k_mb']} MB more than 100 updates. The aims were 2 s and 200 MB: "
            "they are missed.",
            "speed.scale",
            table(("measured", "100 clients", "1,000 clients"), [
                ("command to first training step, maps and states kept", "", f"{known['first_step_s']:.0f} s"),
                ("the same, nothing kept", "", f"{known['first_step_uncached_s']:.0f} s"),
                ("ms per message that are not training", number(over, "100", 0), number(over, "1000", 0)),
                ("memory of all processes (PSS)", *(f"{memory[n] / 1e3:.1f} GB" for n in ("100", "1000"))),
            ]),
        ),
    )  # fmt: skip


def cli_speed() -> str:
    """The command itself."""
    known = load_results("cli")
    told = {
        "help_s": "`heterotune --help`", "report_s": "`heterotune report` of a finished run",
        "doctor_s": "`heterotune doctor`", "dry_run_s": "`heterotune run demo --dry-run`",
    }  # fmt: skip
    rows = [
        (name, number(known, key, 2), f"{known['bounds'][key]:g}") for key, name in told.items()
    ]
    return section(
        "Speed of the command",
        shown(
            f"From start to end of a process of its own, medians of {known['times']} ({known['machine']}).",
            "speed.cli_speed",
            table(("command", "s", "at most"), rows),
        ),
    )


SECTIONS = (memory, gpu, gpu_federated, client_speed, codecs, scale, cli_speed)

"""The structured configuration: one dataclass per room, every field documented where it is read.

OmegaConf checks types and key names against these classes; :mod:`.preflight` checks what types
cannot express. ``Config`` is the whole resolved configuration of a run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: ``data.name`` of Super-NaturalInstructions.
NATURAL_INSTRUCTIONS = "natural_instructions"


def _help(text: str, default: Any) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class TypeConfig:
    """One model type of a simulated federation: backbone + bits, and how many clients own it."""

    backbone: str = _help(
        "embedded name (tiny-a/b/c), fetched name, local directory, hub id, or an installed package's",
        "???",
    )
    bits: str = _help("nf4 | nf4-single | int8 | bf16 | fp32 | auto (what fits memory_gb)", "bf16")
    clients: int = _help("number of clients of this type (simulation only)", 1)
    revision: str | None = _help("hub revision, for hub ids", None)
    memory_gb: float | None = _help(
        "memory a client of this type may use (GB), weights included; null: no limit", None
    )
    slots: str | None = _help("depth slots its clients train; null: train.slots", None)
    guest: bool = _help(
        "its clients have no labelled examples: they learn after the last round, from what the others predict",
        False,
    )


@dataclass
class DataConfig:
    """Which examples, in which prompt form, split how."""

    name: str = _help(
        "embedded data set, one of an installed package, natural_instructions (see `train`), or a free name when "
        "`train` is given", "debian_sections"
    )  # fmt: skip
    train: str | None = _help(
        "path of a .jsonl/.json/.csv/.tsv/.parquet file, or a saved `datasets` folder, with the clients' pool; for "
        "natural_instructions a directory of task .json files or a hub id", None
    )  # fmt: skip
    test: str | None = _help("path of the global test file; null: see `test_share`", None)
    format: str | None = _help(
        "jsonl | csv | parquet | dataset, for `train` and `test`; null: by their names", None
    )
    text_field: str = _help(
        "column that fills {text} of the prompt, or holds chat messages (a list of {role, content} or {from, value})",
        "text",
    )
    label_field: str = _help("column with the answer", "label")
    client_field: str = _help("column that names the natural client", "client")
    references_field: str = _help(
        "column with a list of further right answers, where there is one (generation)", "references"
    )
    prompt: str = _help(
        "prompt form; the answer follows after one space", "Package: {text}\nSection:"
    )
    labels: list[str] | None = _help(
        "closed label set; null takes the sorted answers of the training file when there are at "
        "most `max_labels`, otherwise the task is open text", None
    )  # fmt: skip
    max_labels: int = _help("more distinct answers than this is an open-text task", 64)
    partition: str = _help("dirichlet | iid | natural", "dirichlet")
    alpha: float = _help(
        "Dirichlet concentration over labels (open text: over natural clients, where they are named)", 0.3
    )  # fmt: skip
    groups_per_client: int = _help(
        "partition natural: natural clients (tasks) that one client of the run holds", 1
    )
    examples_per_client: int | None = _help(
        "training examples per client; null: all rows of the file are dealt out", None
    )
    personal_test_examples: int = _help("held-out examples per client, from its own mixture", 32)
    global_test_examples: int = _help("size limit of the global test set", 640)
    max_length: int = _help("tokens per example; longer prompts keep their end", 128)
    generate: int = _help(
        "open text: test examples per test set whose answer is generated (greedily) and scored by exact match and "
        "ROUGE-L; 0: none", 0
    )  # fmt: skip
    max_answer_tokens: int = _help("most tokens of a generated answer", 32)
    stop: str | None = _help(
        "a generated answer ends before this text; null: at the end-of-text token alone", "\n"
    )
    tasks: list[str] | None = _help(
        "natural_instructions: names or patterns (task1*) of the tasks to take; null: all", None
    )
    instances_per_task: int = _help("natural_instructions: the first so many of each task", 500)
    demonstrations: int = _help("natural_instructions: positive examples shown in the prompt", 0)
    test_share: float = _help(
        "share of each natural client's rows (natural_instructions: of each task's instances) kept for the global test "
        "where `train` is given and no `test`", 0.2
    )  # fmt: skip


@dataclass
class MethodConfig:
    """The adapter on the clients: DeMA (or LoRA, for rivals that need it)."""

    kind: str = _help("dema | lora | submodel (a slice of the whole model)", "dema")
    slots: int = _help("K depth slots; the last acts on the final normalised state", 1)
    latent: int = _help("r, width of the shared latent space", 128)
    output: int | None = _help("width of the output latent; null: number of labels or r", None)
    views: list[str] = field(
        default_factory=list,
        metadata={
            "help": "further views of a text that types align, for a pooled classifier: text (what it is made of and "
            "about: means of first and middle states)"
        },
    )
    inner: int = _help(
        "q, inner width of an expert; 0: none, an expert is one matrix P and a bias Q (Co-LoRA)", 32
    )
    experts_global: int = _help("experts shared by all clients", 3)
    experts_type: int = _help("experts shared inside a model type", 0)
    experts_private: int = _help("experts that never leave the client", 0)
    core_rank: int = _help(
        "rank of trained cores on the linear layers of the upper blocks; 0: none",
        0,
    )
    core_kind: str = _help(
        "square (an r x r core between fixed factors: few bytes) | lora (both factors trained)",
        "square",
    )
    core_scope: str = _help(
        "type | client: where cores are averaged, or that they never leave", "type"
    )
    core_from: float = _help("relative depth from which blocks have cores; 0: all of them", 0.5)
    core_scale: float = _help("what a core's effect is multiplied with", 4.0)
    private_dropout: float = _help("probability that a batch drops the private experts", 0.3)
    activation: str = _help("silu | linear (the r x r core of Co-LoRA)", "silu")
    gate: str = _help("dense | top1 | uniform", "dense")
    gate_scope: str = _help("client | type | global: where the gate is averaged", "global")
    lora_rank: int = _help("LoRA rank, for kind=lora", 16)
    lora_alpha: float = _help("LoRA alpha, for kind=lora", 32.0)
    lora_core: bool = _help(
        "kind=lora: train only an r x r core between frozen factors of the weights (Fed-SB)", False
    )
    lora_residual: bool = _help(
        "kind=lora: clients also hold a dense change of every layer that the server sends (FLoRA, FedEx-LoRA)",
        False,
    )
    sub_width: float = _help(
        "kind=submodel: share of the parent's width a client trains (set by the strategy, from its ratios)",
        1.0,
    )
    sub_window: int = _help(
        "kind=submodel: first channel, unit and head of the slice (set by the strategy, every round)",
        0,
    )
    sub_scaler: bool = _help(
        "kind=submodel: divide what every linear layer of a slice puts out by its width (HeteroFL)",
        False,
    )


@dataclass
class AlignmentConfig:
    """How the frozen maps D, U of every type are computed (docs/method.md, section 3)."""

    anchors: str = _help(
        "shipped set (debian-other | wordnet | debian-near), or path of a .txt(.gz) or data file with a column text",
        "debian-other",
    )
    count: int = _help("number of anchors used", 6000)
    positions: str = _help(
        "answer (one row per anchor, where the answer is read) | words (one row per word)", "answer"
    )
    components: int = _help("p, principal components a type sends per slot", 256)
    shrinkage: list[float] = field(
        default_factory=lambda: [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0],
        metadata={"help": "candidates; the best on held-out anchors is taken"},
    )
    weighting: float = _help(
        "latents are weighed by their held-out canonical correlation to this power; 0: equally", 2.0
    )
    output: str = _help("labels | vocabulary: functionals that align the output maps", "labels")
    label_geometry: bool = _help(
        "output=labels: move label words of similar meaning together (false: each alone)", True
    )
    words: int = _help("size of the public word list shared by all vocabularies", 4096)
    output_components: int = _help("components of the unembedding a type sends", 64)
    pullback_anchors: int = _help("anchors for the gradient pull-back of deeper slots", 64)
    quality_threshold: float = _help(
        "held-out canonical correlation below which a type's slot does not share", 0.1
    )
    control: str = _help("none | random_down | random_up | random_maps | rotated_basis", "none")
    cache: bool = _help("reuse the maps of equal (backbones, bits, anchors, settings)", True)


@dataclass
class TrainConfig:
    """Local training on a client."""

    local_steps: int = _help("optimizer steps per round", 12)
    batch_size: int = _help("examples per step", 16)
    learning_rate: float = _help("AdamW learning rate", 2e-3)
    last_rate: float = _help(
        "share of learning_rate in the last round; from round to round it follows half a cosine (arXiv 1608.03983). "
        "1: the rate stays", 1.0
    )  # fmt: skip
    warmup_ratio: float = _help(
        "share of every round's steps in which the rate rises to learning_rate, by equal amounts: the optimizer "
        "starts anew every round, and its first steps are its boldest. 0: none", 0.0
    )  # fmt: skip
    gate_rate: float = _help(
        "AdamW: gates learn at this share of learning_rate; 0: they stay uniform", 0.1
    )
    optimizer: str = _help("local optimizer: adamw | sgd", "adamw")
    weight_decay: float = _help("AdamW weight decay", 0.0)
    proximal: float = _help(
        "FedProx (arXiv 1812.06127): mu of the term mu/2 |w - w_round|^2; 0: none", 0.0
    )
    clip_norm: float = _help("gradient norm limit", 1.0)
    logit_adjustment: float = _help(
        "closed label sets: the loss discounts the client's own label frequencies (arXiv 2007.07314), so that "
        "a skewed client does not teach its skew; its personal test counts them in again. 0: off, 1: fully", 1.0
    )  # fmt: skip
    prior_smoothing: float = _help(
        "examples added to every label when a client counts its frequencies", 0.1
    )
    loss: str = _help(
        "auto | labels (softmax over the label words) | tokens (all answer tokens)", "auto"
    )
    losses: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "further losses on a client's examples, of installed packages: name -> options"
        },
    )
    slots: str = _help(
        "depth slots a client trains: all | upper-half | last-<n>; lower ones act as the server sends them "
        "(a type, or a deployed node, may say otherwise)", "all"
    )  # fmt: skip
    cache_states: bool = _help(
        "keep frozen states below the lowest trained slot (exact, much faster)", True
    )
    gradient_checkpointing: bool = _help(
        "recompute activations in the backward pass: less memory, slower", False
    )


@dataclass
class ExchangeConfig:
    """How tensors travel."""

    codec: str = _help(
        "both ways, where up and down say nothing: bf16 | fp16 | fp32 | int8 | nf4 (64 numbers share a scale), or one "
        "of an installed package", "bf16"
    )  # fmt: skip
    up: str | None = _help(
        "codec of clients' updates; also topk (the largest alone); null: codec", None
    )
    down: str | None = _help("codec of the values sent to clients; null: codec", None)
    top_k: float = _help("topk: share of an update's numbers that travel, 0.001 to 1", 0.1)
    error_feedback: bool = _help(
        "what a lossy codec (int8, nf4, topk) drops of an update is added to the client's next one",
        True,
    )
    resend: str = _help(
        "changed (a client that says it still holds a tensor bit for bit is not sent it again) | always",
        "changed",
    )


@dataclass
class ServerConfig:
    """Rounds, participation and patience of the server."""

    rounds: int = _help("rounds per strategy", 30)
    participation: float = _help("share of clients trained per round", 1.0)
    min_clients: int | None = _help(
        "wait for this many clients; null: all simulated ones; 2 of a deployment", None
    )
    wait_seconds: float = _help("patience for the clients to appear", 300.0)
    timeout_seconds: float = _help("patience for one round's replies", 3600.0)
    query_seconds: float | None = _help(
        "patience for the answers before the first round (who is there, alignment); null: timeout_seconds", None
    )  # fmt: skip
    give_up_after: int = _help(
        "rounds in a row without a usable update after which a run ends (it can be resumed); 0: never", 3
    )  # fmt: skip
    keep_checkpoints: int = _help(
        "checkpoints kept per strategy and seed, one a round (at least 2); 0: none are written, no resume", 2
    )  # fmt: skip
    evaluate_every: int = _help("evaluate every so many rounds (the last always); 0: last only", 10)
    evaluate_clients: float | None = _help(
        "clients that are tested: a number, or below 1 a share; the same ones every time, drawn once by the seed, from "
        "every type. null: all up to 48, 48 of more", None
    )  # fmt: skip
    evaluate_before: bool = _help("test the untouched models too, before round 1", True)
    min_results: int = _help(
        "usable updates a round needs; with fewer it is skipped and nothing changes. 1: whoever answers counts; set "
        "it to half of the clients asked where a few must not decide for all", 1
    )  # fmt: skip
    norm_limit: float | None = _help(
        "an update this many times longer than its round's and its type's usual ones is refused; null: not checked",
        5.0,
    )
    norm_ceiling: float | None = _help(
        "an update this many times longer than the local optimizer can go is refused; null: not checked",
        3.0,
    )
    cooldown_after: int = _help(
        "failures in a row (refused, an error, no answer) after which a client is not asked for a while; 0: never", 3
    )  # fmt: skip
    cooldown_longest: int = _help(
        "longest cooldown in rounds; the first lasts 2, each further one doubles", 16
    )
    deadline_factor: float | None = _help(
        "a client that has answered before is waited for this many times its type's median; null: timeout_seconds",
        3.0,
    )
    deadline_floor_seconds: float = _help("no deadline is shorter than this", 60.0)
    quorum: float | None = _help(
        "share of the asked clients after whose results, and `grace_seconds`, a round closes; null: wait for all. "
        "Results then depend on timing", None
    )  # fmt: skip
    grace_seconds: float = _help(
        "how long the others are still waited for once `quorum` is reached", 10.0
    )
    oversample: float = _help(
        "ask this share more clients than needed and take the first results; 0: none. Results then depend on timing",
        0.0,
    )


@dataclass
class RunConfig:
    """What is run and where its results go."""

    name: str = _help("name of the run directory", "run")
    dir: str | None = _help("absolute run directory; null: ~/heterotune-runs/<name>-<time>", None)
    compare: list[str] = field(
        default_factory=lambda: ["heterotune"],
        metadata={"help": "strategies (files of conf/strategy) run one after the other"},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "one full run per seed"}
    )
    state_dir: str | None = _help("clients' state; null: <run dir>/state (simulation)", None)
    worker_threads: int = _help("torch threads per worker process", 1)
    workers: int | None = _help(
        "worker processes of a simulation; null: one per worker_threads cores, at most one per client", None
    )  # fmt: skip


@dataclass
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    types: list[TypeConfig] = field(default_factory=list)
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    #: name -> {"_component_": dotted path, options...}; free-form, the strategy checks its options
    strategies: dict[str, Any] = field(default_factory=dict)

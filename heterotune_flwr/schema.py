"""The structured configuration: one dataclass per room, every field documented where it is read.

OmegaConf checks types and key names against these classes; :mod:`.preflight` checks what types
cannot express. ``Config`` is the whole resolved configuration of a run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from heterotune_flwr.fields import option

#: ``data.name`` of Super-NaturalInstructions.
NATURAL_INSTRUCTIONS = "natural_instructions"
#: ``nf4`` quantizes its block scales once more (double quantization), ``nf4-single`` does not.
BITS = ("nf4", "nf4-single", "int8", "bf16", "fp32")
#: In place of bits: take what fits the memory (:mod:`.backbones.bits`).
AUTO = "auto"
#: How numbers travel (:mod:`.exchange.codecs`); ``topk`` sends the largest alone.
CODECS = ("bf16", "fp16", "fp32", "int8", "nf4", "topk")
#: Where runs go whose directory nobody names.
RUNS_FOLDER = "~/heterotune-runs"


@dataclass
class TypeConfig:
    """One model type of a simulated federation: backbone + bits, and how many clients own it."""

    backbone: str = option(
        "???",
        "embedded name (tiny-a/b/c), fetched name, local directory, hub id, or an installed package's",
    )
    bits: str = option(
        "bf16",
        "of its weights; auto: what fits memory_gb",
        choices=(*BITS, AUTO),
    )
    clients: int = option(
        1,
        "number of clients of this type (simulation only); unsaid beside `owners`: as many as these [clients]",
        least=1,
    )
    owners: list[str] | None = option(
        None,
        "data.partition natural: names of the natural clients that its clients hold, in their order "
        "(data.groups_per_client each); null: the largest that no type names",
    )
    revision: str | None = option(None, "hub revision, for hub ids")
    memory_gb: float | None = option(
        None,
        "memory a client of this type may use, weights included; null: no limit [GB]",
        above=0,
    )
    slots: str | None = option(None, "depth slots its clients train; null: train.slots")
    guest: bool = option(
        False,
        "its clients have no labelled examples: they learn after the last round, from what the others predict",
    )


@dataclass
class DataConfig:
    """Which examples, in which prompt form, split how."""

    name: str = option(
        "debian_sections",
        "embedded data set, one of an installed package, natural_instructions (see `train`), or a free name when "
        "`train` is given",
    )
    train: str | None = option(
        None,
        "path of a .jsonl/.json/.csv/.tsv/.parquet file, or a saved `datasets` folder, with the clients' pool; for "
        "natural_instructions a directory of task .json files or a hub id",
    )
    test: str | None = option(None, "path of the global test file; null: see `test_share`")
    format: str | None = option(
        None, "jsonl | csv | parquet | dataset, for `train` and `test`; null: by their names"
    )
    text_field: str = option(
        "text",
        "column that fills {text} of the prompt, or holds chat messages (a list of {role, content} or {from, value})",
    )
    label_field: str = option("label", "column with the answer")
    client_field: str = option("client", "column that names the natural client")
    references_field: str = option(
        "references", "column with a list of further right answers, where there is one (generation)"
    )
    prompt: str = option(
        "{text}\nAnswer:",
        "prompt form; the answer follows after one space, in chat form as the model's reply",
    )
    template: str = option(
        AUTO,
        "chat: the model's own chat template; plain: prompt, space, answer; auto: chat where a model has a template",
        choices=(AUTO, "chat", "plain"),
    )
    system: str | None = option(
        None, "a system prompt; of a conversation that has one, its own holds"
    )
    labels: list[str] | None = option(
        None,
        "closed label set; null takes the sorted answers of the training file when there are at "
        "most `max_labels`, otherwise the task is open text",
    )
    max_labels: int = option(64, "more distinct answers than this is an open-text task [labels]")
    partition: str = option(
        "dirichlet", "how rows are dealt out to clients", choices=("dirichlet", "iid", "natural")
    )
    alpha: float = option(
        0.3,
        "Dirichlet concentration over labels (open text: over natural clients, where they are named) [concentration]",
        above=0,
    )
    groups_per_client: int = option(
        1,
        "partition natural: natural clients (tasks) that one client of the run holds [natural clients]",
        least=1,
    )
    examples_per_client: int | None = option(
        None,
        "training examples per client; null: all rows of the file are dealt out [examples]",
        above=0,
    )
    personal_test_examples: int = option(
        32, "held-out examples per client, from its own mixture [examples]", least=0
    )
    global_test_examples: int = option(640, "size limit of the global test set [examples]", least=0)
    max_length: int = option(
        128,
        "tokens per example; longer prompts keep their end, chats their last turns [tokens]",
        least=8,
    )
    generate: int = option(
        0,
        "open text: test examples per test set whose answer is generated (greedily) and scored by exact match and "
        "ROUGE-L; 0: none [examples]",
        least=0,
    )
    max_answer_tokens: int = option(32, "most tokens of a generated answer [tokens]", least=1)
    stop: str | None = option(
        AUTO,
        "a generated answer ends before this text; auto: a new line in plain form, in chat form none; null: none",
    )
    tasks: list[str] | None = option(
        None, "natural_instructions: names or patterns (task1*) of the tasks to take; null: all"
    )
    instances_per_task: int = option(
        500, "natural_instructions: the first so many of each task [examples]", least=1
    )
    demonstrations: int = option(
        0, "natural_instructions: positive examples shown in the prompt [examples]", least=0
    )
    test_share: float = option(
        0.2,
        "share of each natural client's rows (natural_instructions: of each task's instances) kept for the global test "
        "where `train` is given and no `test` [share]",
        above=0,
        below=1,
    )


@dataclass
class MethodConfig:
    """The adapter on the clients: DeMA (or LoRA, for rivals that need it)."""

    kind: str = option(
        "dema",
        "the adapter; submodel: a slice of the whole model",
        choices=("dema", "lora", "submodel"),
    )
    slots: int = option(
        1, "K depth slots; the last acts on the final normalised state [slots]", least=1
    )
    latent: int = option(128, "r, width of the shared latent space [dimensions]", least=1)
    output: int | None = option(
        None, "width of the output latent; null: number of labels or r [dimensions]"
    )
    views: list[str] = option(
        [],
        "further views of a text that types align, for a pooled classifier: text (what it is made of and "
        "about: means of first and middle states)",
    )
    inner: int = option(
        32,
        "q, inner width of an expert; 0: none, an expert is one matrix P and a bias Q (Co-LoRA) [dimensions]",
        least=0,
    )
    experts_global: int = option(3, "experts, shared by all clients [experts]", least=1)
    core_rank: int = option(
        0, "rank of trained cores on the linear layers of the upper blocks; 0: none [rank]", least=0
    )
    core_kind: str = option(
        "square",
        "square: an r x r core between fixed factors (few bytes); lora: both factors are trained",
        choices=("square", "lora"),
    )
    core_scope: str = option(
        "type",
        "where cores are averaged; client: they never leave",
        choices=("type", "client"),
    )
    core_from: float = option(
        0.5,
        "relative depth from which blocks have cores; 0: all of them [share of the depth]",
        least=0,
        below=1,
    )
    core_scale: float = option(4.0, "what a core's effect is multiplied with [factor]", above=0)
    activation: str = option(
        "silu", "of experts; linear: the r x r core of Co-LoRA", choices=("silu", "linear")
    )
    gate: str = option("dense", "how experts are weighed", choices=("dense", "uniform"))
    gate_scope: str = option(
        "global",
        "where the gate is averaged",
        choices=("client", "type", "global"),
    )
    lora_rank: int = option(16, "kind=lora: rank of the two factors [rank]", least=1)
    lora_alpha: float = option(
        32.0, "kind=lora: its effect is multiplied with lora_alpha / lora_rank [factor]", above=0
    )
    lora_core: bool = option(
        False,
        "kind=lora: train only an r x r core between frozen factors of the weights (Fed-SB)",
        by_strategy=True,
    )
    lora_residual: bool = option(
        False,
        "kind=lora: clients also hold a dense change of every layer that the server sends (FLoRA, FedEx-LoRA)",
        by_strategy=True,
    )
    sub_width: float = option(
        1.0,
        "kind=submodel: share of the parent's width a client trains [share]",
        by_strategy=True,
    )
    sub_window: int = option(
        0,
        "kind=submodel: first channel, unit and head of the slice [channels]",
        by_strategy=True,
    )
    sub_scaler: bool = option(
        False,
        "kind=submodel: divide what every linear layer of a slice puts out by its width (HeteroFL)",
        by_strategy=True,
    )


@dataclass
class AlignmentConfig:
    """How the frozen maps D, U of every type are computed (docs/method.md, section 3)."""

    anchors: str = option(
        "debian-other",
        "shipped set (debian-other | wordnet | debian-near), or path of a .txt(.gz) or data file with a column text",
    )
    count: int = option(6000, "number of anchors used [texts]", least=10)
    components: int = option(
        256,
        "p, principal components of its states that a type sends per slot [components]",
        least=1,
    )
    shrinkage: list[float] = option(
        [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0],
        "ridges on every type's covariances, of which the best on held-out anchors is taken [mean squares]",
    )
    weighting: float = option(
        2.0,
        "latents are weighed by their held-out canonical correlation to this power; 0: equally [power]",
    )
    output: str = option(
        "labels",
        "functionals that align the output maps",
        choices=("labels", "vocabulary"),
    )
    label_geometry: bool = option(
        True, "output=labels: move label words of similar meaning together (false: each alone)"
    )
    symbols: int = option(
        4096,
        "output=vocabulary: so many of the vocabularies' common pieces, the most frequent, align outputs [symbols]",
        least=2,
    )
    output_components: int = option(64, "components of the unembedding a type sends [components]")
    pullback_anchors: int = option(64, "anchors for the gradient pull-back of deeper slots [texts]")
    quality_threshold: float = option(
        0.1, "held-out canonical correlation below which a type's slot does not share [correlation]"
    )
    control: str = option(
        "none",
        "maps that are wrong on purpose, to measure what alignment gives",
        choices=("none", "random_down", "random_up", "random_maps", "rotated_basis"),
    )
    cache: bool = option(True, "reuse the maps of equal (backbones, bits, anchors, settings)")


@dataclass
class TrainConfig:
    """Local training on a client."""

    local_steps: int = option(12, "optimizer steps per round [steps]", least=1)
    batch_size: int = option(16, "examples per step [examples]", least=1)
    learning_rate: float = option(2e-3, "learning rate of the local optimizer [per step]", above=0)
    last_rate: float = option(
        1.0,
        "share of learning_rate in the last round; from round to round it follows half a cosine (arXiv 1608.03983). "
        "1: the rate stays [share]",
        above=0,
        most=1,
    )
    warmup_ratio: float = option(
        0.0,
        "share of every round's steps in which the rate rises to learning_rate, by equal amounts. The optimizer "
        "starts anew every round, and its first steps are its boldest. 0: none [share]",
        least=0,
        most=1,
    )
    gate_rate: float = option(
        0.1,
        "AdamW: gates learn at this share of learning_rate; 0: they stay uniform [share]",
        least=0,
    )
    optimizer: str = option("adamw", "local optimizer", choices=("adamw", "sgd"))
    weight_decay: float = option(
        0.0, "AdamW: how much weights shrink, times the learning rate [per step]"
    )
    proximal: float = option(
        0.0,
        "FedProx (arXiv 1812.06127): mu of the term mu/2 |w - w_round|^2; 0: none [factor]",
        least=0,
    )
    clip_norm: float = option(1.0, "a step's gradient is shortened to this norm [norm]", above=0)
    logit_adjustment: float = option(
        1.0,
        "closed label sets: the loss discounts the client's own label frequencies (arXiv 2007.07314), so that "
        "a skewed client does not teach its skew. Its personal test counts them in again. 0: off, 1: fully [factor]",
        least=0,
    )
    prior_smoothing: float = option(
        0.1,
        "examples added to every label when a client counts its frequencies [examples]",
        above=0,
    )
    loss: str = option(
        "auto",
        "labels: softmax over the label words; tokens: all answer tokens",
        choices=("auto", "labels", "tokens"),
    )
    losses: dict[str, Any] = option(
        {}, "further losses on a client's examples, of installed packages: name -> options"
    )
    slots: str = option(
        "all",
        "depth slots a client trains: all | upper-half | last-<n>; lower ones act as the server sends them "
        "(a type, or a deployed node, may say otherwise)",
    )
    cache_states: bool = option(
        True, "keep frozen states below the lowest trained slot (exact, much faster)"
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, slower"
    )


@dataclass
class ExchangeConfig:
    """How tensors travel."""

    codec: str = option(
        "bf16",
        "both ways, where up and down say nothing; nf4: 64 numbers share a scale",
        choices=CODECS,
        plugins="codecs",
    )
    up: str | None = option(
        None,
        "codec of clients' updates; topk: the largest alone; null: codec",
        choices=CODECS,
        plugins="codecs",
    )
    down: str | None = option(
        None,
        "codec of the values sent to clients; null: codec",
        choices=CODECS[:-1],
        plugins="codecs",
    )
    top_k: float = option(
        0.1,
        "topk: how many of an update's numbers travel [share]",
        least=0.001,
        most=1,
    )
    error_feedback: bool = option(
        True,
        "what a lossy codec (int8, nf4, topk) drops of an update is added to the client's next one",
    )
    resend: str = option(
        "changed",
        "changed: a client that says it still holds a tensor bit for bit is not sent it again",
        choices=("changed", "always"),
    )


@dataclass
class ServerConfig:
    """Rounds, participation and patience of the server."""

    rounds: int = option(30, "rounds per strategy [rounds]", least=1)
    participation: float = option(
        1.0, "share of clients trained per round [share]", above=0, most=1
    )
    min_clients: int | None = option(
        None,
        "wait for this many clients; null: all simulated ones; 2 of a deployment [clients]",
        above=0,
    )
    wait_seconds: float = option(300.0, "patience for the clients to appear [seconds]", above=0)
    timeout_seconds: float = option(3600.0, "patience for one round's replies [seconds]", above=0)
    query_seconds: float | None = option(
        None,
        "patience for the answers before the first round (who is there, alignment); null: timeout_seconds [seconds]",
        above=0,
    )
    give_up_after: int = option(
        3,
        "rounds in a row without a usable update after which a run ends (it can be resumed); 0: never [rounds]",
        least=0,
    )
    keep_checkpoints: int = option(
        2,
        "kept per strategy and seed, one a round (at least 2); 0: none are written, no resume [checkpoints]",
        least=0,
    )
    evaluate_every: int = option(
        10, "evaluate every so many rounds (the last always); 0: last only [rounds]", least=0
    )
    evaluate_clients: float | None = option(
        None,
        "clients that are tested: a number, or below 1 a share. The same ones every time, drawn once by the seed, from "
        "every type. null: all up to 48, 48 of more [clients or share]",
        above=0,
    )
    take_home: bool = option(
        True,
        "in the last test every tested client trains alone too (methods of kind dema). By examples of its own it keeps "
        "the best of its bare model, that one and the federated one. false: nothing is chosen or kept",
    )
    evaluate_before: bool = option(True, "test the untouched models too, before round 1")
    min_results: int = option(
        1,
        "usable updates a round needs; with fewer it is skipped and nothing changes. 1: whoever answers counts; set "
        "it to half of the clients asked where a few must not decide for all [updates]",
        least=1,
    )
    norm_limit: float | None = option(
        5.0,
        "an update so many times longer than its round's and type's usual ones is refused; null: not checked [factor]",
        above=1,
    )
    norm_ceiling: float | None = option(
        3.0,
        "an update so many times longer than the local optimizer can go is refused; null: not checked [factor]",
        above=1,
    )
    cooldown_after: int = option(
        3,
        "in a row (refused, an error, no answer), after which a client is not asked for a while; 0: never [failures]",
        least=0,
    )
    cooldown_longest: int = option(
        16,
        "longest cooldown; the first lasts 2, each further one doubles [rounds]",
        least=1,
    )
    deadline_factor: float | None = option(
        3.0,
        "who has answered before is waited for so many times its type's median; null: timeout_seconds [factor]",
        above=1,
    )
    deadline_floor_seconds: float = option(
        60.0, "no deadline is shorter than this [seconds]", least=0
    )
    quorum: float | None = option(
        None,
        "share of the asked clients after whose results, and `grace_seconds`, a round closes; null: wait for all. "
        "Results then depend on timing [share]",
        above=0,
        most=1,
    )
    grace_seconds: float = option(
        10.0, "how long the others are still waited for once `quorum` is reached [seconds]", least=0
    )
    oversample: float = option(
        0.0,
        "ask so many more clients than needed, take the first results; 0: none. Results then depend on timing [share]",
        least=0,
        most=1,
    )


@dataclass
class RunConfig:
    """What is run and where its results go."""

    name: str = option("run", "name of the run directory")
    dir: str | None = option(None, "absolute run directory; null: ~/heterotune-runs/<name>-<time>")
    compare: list[str] = option(
        ["heterotune"], "strategies (files of conf/strategy) run one after the other"
    )
    seeds: list[int] = option([0], "one full run per seed [seeds]")
    state_dir: str | None = option(None, "clients' state; null: <run dir>/state (simulation)")
    track: list[str] = option(
        [], "trackers that follow the run: tensorboard, wandb, mlflow (docs/trackers.md)"
    )
    worker_threads: int = option(1, "torch threads per worker process [threads]", least=1)
    workers: int | None = option(
        None,
        "worker processes of a simulation; null: one per worker_threads cores, at most one per client [processes]",
        least=1,
    )


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

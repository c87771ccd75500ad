"""Configuration of the DeMA tuner; the fields' help texts are its documentation."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from typing import Any

from peft.config import PeftConfig
from peft.utils import TaskType

from heterotune_flwr.backbones.prepared import found_again
from heterotune_flwr.backbones.views import VIEWS
from heterotune_flwr.dema.registration import register
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.schema import MethodConfig

ACTIVATIONS = ("silu", "linear")
GATES = ("dense", "uniform")


@dataclass
class DeMAConfig(PeftConfig):  # type: ignore[misc]
    """Dense mixture of adapters in a latent space shared by different models (our definition).

    Example::

        model = get_peft_model(backbone, DeMAConfig(task_type="CAUSAL_LM", slots=2, latent=64))

    Raises :class:`~heterotune_flwr.errors.ConfigError` for values that cannot work.
    """

    slots: int = field(
        default=1, metadata={"help": "depth slots K; the last one is the final norm"}
    )
    latent: int = field(default=128, metadata={"help": "width r of the shared latent space"})
    output: int | None = field(
        default=None, metadata={"help": "width of the output latent; r if null"}
    )
    inner: int = field(
        default=32,
        metadata={"help": "inner width q of an expert; 0: one matrix and a bias, no inner layer"},
    )
    experts_global: int = field(default=3, metadata={"help": "experts, shared by every client"})
    activation: str = field(default="silu", metadata={"help": "silu | linear"})
    gate: str = field(
        default="dense",
        metadata={"help": "dense (softmax over all experts) | uniform (no gate)"},
    )
    seed: int = field(
        default=0, metadata={"help": "public seed of experts and of the default maps"}
    )
    final_norm_module: str | None = field(
        default=None, metadata={"help": "name of the final norm; found by itself when null"}
    )
    mlp_modules: list[str] | None = field(
        default=None, metadata={"help": "names of the blocks' MLPs, bottom up; found when null"}
    )
    slot_modules: list[str] | None = field(
        default=None, metadata={"help": "set by the tuner: the module of every slot, bottom up"}
    )
    head_labels: list[list[int]] | None = field(
        default=None,
        metadata={
            "help": "token ids of every label of a closed set, to whose logits the frozen head adds; null: no head"
        },
    )
    head_prompt_end: list[int] = field(
        default_factory=list,
        metadata={"help": "token ids that every prompt ends with: the head acts right after them"},
    )
    head_views: list[str] = field(
        default_factory=list, metadata={"help": "views of a text the head reads besides: text"}
    )
    core_modules: list[str] | None = field(
        default=None,
        metadata={"help": "linear layers that are changed besides, by a core of low rank each"},
    )
    core_rank: int = field(default=16, metadata={"help": "rank of the cores"})
    core_scale: float = field(
        default=1.0, metadata={"help": "what a core's effect is multiplied with"}
    )
    backbone: dict[str, str | None] | None = field(
        default=None,
        metadata={
            "help": "how the backbone is found again (source, revision, bits, fingerprint): base_model_name_or_path "
            "is then made from it, on the machine at hand"
        },
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "further modules to train and save whole; task heads are added by PEFT"},
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "rows of the embedding to train and save besides"}
    )
    # PEFT reads (and for mixture-of-experts backbones writes) the next two on every configuration. They
    # are sets to PEFT, which shortens and reorders them; slots have an order, hence slot_modules.
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "not used: the slots decide"}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "not used: the slots decide"}
    )
    # Stand in adapters that were saved before these experts went.
    experts_type: InitVar[int] = 0
    experts_private: InitVar[int] = 0
    private_dropout: InitVar[float] = 0.0

    def __post_init__(
        self, experts_type: int, experts_private: int, private_dropout: float
    ) -> None:
        """Fix the PEFT type and check the values."""
        super().__post_init__()
        if experts_type or experts_private:
            raise ConfigError(
                f"DeMA: experts_type is {experts_type}, experts_private is {experts_private}; experts that a type or a "
                "client has alone are no more: load this adapter with the version that saved it"
            )
        self.peft_type = register()
        least_of = {"slots": 1, "latent": 1, "inner": 0, "experts_global": 1, "core_rank": 1}
        for name, least in least_of.items():
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"DeMA: {name} is {value}, it must be at least {least}")
        if self.output is not None and self.output < 1:
            raise ConfigError(f"DeMA: output is {self.output}, it must be at least 1 (or null)")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"DeMA: activation is {self.activation!r}; choose from {ACTIVATIONS}")
        if self.gate not in GATES:
            raise ConfigError(f"DeMA: gate is {self.gate!r}; choose from {GATES}")
        if self.task_type == TaskType.SEQ_2_SEQ_LM:
            raise ConfigError(
                "DeMA: task_type is SEQ_2_SEQ_LM, but DeMA needs a decoder-only model"
            )
        if self.head_labels is not None and not all([self.head_labels, *self.head_labels]):
            raise ConfigError("DeMA: head_labels lacks labels, or tokens of one")
        if unknown := sorted(set(self.head_views) - set(VIEWS)):
            raise ConfigError(f"DeMA: head_views is {unknown}; choose from {', '.join(VIEWS)}")
        if self.target_modules or self.target_parameters:
            raise ConfigError(
                "DeMA: target_modules and target_parameters are not used; name the final norm with "
                "final_norm_module and the blocks' MLPs with mlp_modules, or leave them to be found"
            )
        if self.backbone is not None:
            self.base_model_name_or_path = found_again(self.backbone)

    def to_dict(self) -> dict[str, Any]:
        """As saved: the backbone by its name, not by where it lies on this machine."""
        plain: dict[str, Any] = super().to_dict()
        if self.backbone is not None:
            plain["base_model_name_or_path"] = self.backbone["source"]
        return plain

    @property
    def output_width(self) -> int:
        """Width of the output latent (r_out)."""
        return self.output or self.latent

    @classmethod
    def from_method(cls, method: MethodConfig, output: int, seed: int = 0) -> DeMAConfig:
        """The tuner configuration of a run's ``method`` section."""
        return cls(
            task_type="CAUSAL_LM",
            slots=method.slots,
            latent=method.latent,
            output=output,
            inner=method.inner,
            experts_global=method.experts_global,
            activation=method.activation,
            gate=method.gate,
            seed=seed,
        )

"""Every option and every default, as frozen dataclasses. The field docstrings are the text of `--help`.

An option that would have no effect is an error: options that belong to one choice of another option are None where
they were not given, and `__post_init__` refuses them where they do not apply. What stands for them then, their class
says beside them (`not_given`), or a property computes it from others; code reads it by `settled`, or as the property;
the steps of preferences read all at once, as an `Objective`. Options are checked once, where they are made: what a run
fills in itself is not refused again (`Options.filled`).
"""

from dpo_jax.config.bases import is_url as is_url
from dpo_jax.config.command_line.shipped import derive as derive
from dpo_jax.config.commands.guide import (
    CompletionRun as CompletionRun,
    ConfigsRun as ConfigsRun,
    DemoRun as DemoRun,
    ReportRun as ReportRun,
)
from dpo_jax.config.commands.judge import EndpointConfig as EndpointConfig, JudgeRun as JudgeRun, PairsRun as PairsRun
from dpo_jax.config.commands.measuring import (
    EvalRun as EvalRun,
    ForwardRun as ForwardRun,
    LmEvalRun as LmEvalRun,
    LogpsRun as LogpsRun,
    SafetyRun as SafetyRun,
    ScoreRun as ScoreRun,
    WinRateRun as WinRateRun,
)
from dpo_jax.config.commands.models import (
    AverageRun as AverageRun,
    ConvertRun as ConvertRun,
    ExtendVocabRun as ExtendVocabRun,
)
from dpo_jax.config.commands.mt_bench import (
    MTBenchAnswerRun as MTBenchAnswerRun,
    MTBenchJudgeRun as MTBenchJudgeRun,
    MTBenchShowRun as MTBenchShowRun,
)
from dpo_jax.config.commands.plan import AssumeConfig as AssumeConfig, BenchRun as BenchRun, PlanRun as PlanRun
from dpo_jax.config.commands.rows import InspectRun as InspectRun, PrepareRun as PrepareRun
from dpo_jax.config.commands.writing import (
    ChatRun as ChatRun,
    GenerateRun as GenerateRun,
    ServeRun as ServeRun,
)
from dpo_jax.config.devices import DistributedConfig as DistributedConfig, MeshConfig as MeshConfig
from dpo_jax.config.optimizer import OptimizerConfig as OptimizerConfig
from dpo_jax.config.options import ON_COMMAND_LINE as ON_COMMAND_LINE, OPEN as OPEN, SET_BY_RECIPE as SET_BY_RECIPE
from dpo_jax.config.recipes.aif import ASPECTS as ASPECTS, AIFRun as AIFRun, WriterConfig as WriterConfig
from dpo_jax.config.recipes.dsft import (
    DialogueFilterConfig as DialogueFilterConfig,
    DSFTRun as DSFTRun,
    SelfInstructConfig as SelfInstructConfig,
)
from dpo_jax.config.recipes.frontier import (
    FRONTIER_SIZES as FRONTIER_SIZES,
    FrontierConfig as FrontierConfig,
    FrontierRun as FrontierRun,
)
from dpo_jax.config.recipes.iterative_rpo import IterativeRPORun as IterativeRPORun
from dpo_jax.config.recipes.llama2_chat import ChatRecipeConfig as ChatRecipeConfig, Llama2ChatRun as Llama2ChatRun
from dpo_jax.config.recipes.llama3 import Llama3Run as Llama3Run
from dpo_jax.config.recipes.zephyr import ZephyrRun as ZephyrRun
from dpo_jax.config.sections import (
    GATHERED as GATHERED,
    LINEAR_LAYERS as LINEAR_LAYERS,
    NO_LORA as NO_LORA,
    TENSOR as TENSOR,
    TRAINING as TRAINING,
    AttentionKernel as AttentionKernel,
    CheckpointConfig as CheckpointConfig,
    DataConfig as DataConfig,
    EnergyConfig as EnergyConfig,
    FilesConfig as FilesConfig,
    Layout as Layout,
    LogConfig as LogConfig,
    LoraConfig as LoraConfig,
    Narrow as Narrow,
    Remat as Remat,
    SampleConfig as SampleConfig,
    SampleLayout as SampleLayout,
    TrainConfig as TrainConfig,
)
from dpo_jax.config.training.distill import (
    DistillConfig as DistillConfig,
    DistillRun as DistillRun,
    DistillStepConfig as DistillStepConfig,
)
from dpo_jax.config.training.dpo import (
    BETAS as BETAS,
    DPOConfig as DPOConfig,
    DPOLossConfig as DPOLossConfig,
    DPORun as DPORun,
    Loss as Loss,
    Objective as Objective,
    Ties as Ties,
)
from dpo_jax.config.training.gatt import ConstraintKind as ConstraintKind, GattConfig as GattConfig, GattRun as GattRun
from dpo_jax.config.training.online_dpo import OnlineConfig as OnlineConfig, OnlineDPORun as OnlineDPORun
from dpo_jax.config.training.ppo import PPOConfig as PPOConfig, PPOLossConfig as PPOLossConfig
from dpo_jax.config.training.ppo_run import GRPORun as GRPORun, PPORun as PPORun
from dpo_jax.config.training.presets import PRESETS as PRESETS
from dpo_jax.config.training.rejection import RejectionConfig as RejectionConfig, RejectionRun as RejectionRun
from dpo_jax.config.training.reward import (
    ClassHead as ClassHead,
    RewardConfig as RewardConfig,
    RewardLossConfig as RewardLossConfig,
    RewardRun as RewardRun,
)
from dpo_jax.config.training.run import (
    HoldoutRun as HoldoutRun,
    JudgedRun as JudgedRun,
    SampledRun as SampledRun,
    TrainingRun as TrainingRun,
)
from dpo_jax.config.training.sft import (
    Proposal as Proposal,
    SFTConfig as SFTConfig,
    SFTDataConfig as SFTDataConfig,
    SFTLossConfig as SFTLossConfig,
    SFTRun as SFTRun,
    sft_inside as sft_inside,
)

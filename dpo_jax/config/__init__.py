"""Every option and every default, as frozen dataclasses. The field docstrings are the text of `--help`.

An option that would have no effect is an error: options that belong to one choice of another option are None where
they were not given, and `__post_init__` refuses them where they do not apply. What stands for them then, their class
says beside them (`not_given`), or a property computes it from others; code reads it by `resolved`, or as the property.
"""

from dpo_jax.config.aif import ASPECTS as ASPECTS, AIFRun as AIFRun, WriterConfig as WriterConfig
from dpo_jax.config.average import AverageRun as AverageRun
from dpo_jax.config.checks import ON_COMMAND_LINE as ON_COMMAND_LINE, OPEN as OPEN, SET_BY_RECIPE as SET_BY_RECIPE
from dpo_jax.config.commands import (
    CompletionRun as CompletionRun,
    ConfigsRun as ConfigsRun,
    ConvertRun as ConvertRun,
    DemoRun as DemoRun,
    EvalRun as EvalRun,
    ForwardRun as ForwardRun,
    GenerateRun as GenerateRun,
    InspectRun as InspectRun,
    LogpsRun as LogpsRun,
    ReportRun as ReportRun,
    ScoreRun as ScoreRun,
)
from dpo_jax.config.distill import (
    DistillConfig as DistillConfig,
    DistillRun as DistillRun,
    DistillStepConfig as DistillStepConfig,
)
from dpo_jax.config.dpo import (
    BETAS as BETAS,
    DPOConfig as DPOConfig,
    DPOLossConfig as DPOLossConfig,
    DPORun as DPORun,
    Loss as Loss,
    Ties as Ties,
)
from dpo_jax.config.dsft import (
    DialogueFilterConfig as DialogueFilterConfig,
    DSFTRun as DSFTRun,
    SelfInstructConfig as SelfInstructConfig,
)
from dpo_jax.config.frontier import (
    FRONTIER_SIZES as FRONTIER_SIZES,
    FrontierConfig as FrontierConfig,
    FrontierRun as FrontierRun,
)
from dpo_jax.config.gatt import ConstraintKind as ConstraintKind, GattConfig as GattConfig, GattRun as GattRun
from dpo_jax.config.iterative_rpo import IterativeRPORun as IterativeRPORun
from dpo_jax.config.judge import EndpointConfig as EndpointConfig, JudgeRun as JudgeRun, PairsRun as PairsRun
from dpo_jax.config.llama2_chat import ChatRecipeConfig as ChatRecipeConfig, Llama2ChatRun as Llama2ChatRun
from dpo_jax.config.llama3 import Llama3Run as Llama3Run
from dpo_jax.config.lm_eval import LmEvalRun as LmEvalRun
from dpo_jax.config.mt_bench import (
    MTBenchAnswerRun as MTBenchAnswerRun,
    MTBenchJudgeRun as MTBenchJudgeRun,
    MTBenchShowRun as MTBenchShowRun,
)
from dpo_jax.config.online_dpo import OnlineConfig as OnlineConfig, OnlineDPORun as OnlineDPORun
from dpo_jax.config.plan import AssumeConfig as AssumeConfig, BenchRun as BenchRun, PlanRun as PlanRun
from dpo_jax.config.ppo import PPOConfig as PPOConfig, PPOLossConfig as PPOLossConfig
from dpo_jax.config.ppo_run import GRPORun as GRPORun, PPORun as PPORun
from dpo_jax.config.prepare import PrepareRun as PrepareRun
from dpo_jax.config.presets import PRESETS as PRESETS
from dpo_jax.config.rejection import RejectionConfig as RejectionConfig, RejectionRun as RejectionRun
from dpo_jax.config.reward import (
    ClassHead as ClassHead,
    RewardConfig as RewardConfig,
    RewardLossConfig as RewardLossConfig,
    RewardRun as RewardRun,
)
from dpo_jax.config.safety import SafetyRun as SafetyRun
from dpo_jax.config.sections import (
    GATHERED as GATHERED,
    LINEAR_LAYERS as LINEAR_LAYERS,
    TENSOR as TENSOR,
    TRAINING as TRAINING,
    AttentionKernel as AttentionKernel,
    CheckpointConfig as CheckpointConfig,
    DataConfig as DataConfig,
    DistributedConfig as DistributedConfig,
    EnergyConfig as EnergyConfig,
    FilesConfig as FilesConfig,
    Layout as Layout,
    LogConfig as LogConfig,
    LoraConfig as LoraConfig,
    MeshConfig as MeshConfig,
    Narrow as Narrow,
    OptimizerConfig as OptimizerConfig,
    Remat as Remat,
    SampleConfig as SampleConfig,
    SampleLayout as SampleLayout,
    TrainConfig as TrainConfig,
)
from dpo_jax.config.sft import (
    Proposal as Proposal,
    SFTConfig as SFTConfig,
    SFTDataConfig as SFTDataConfig,
    SFTLossConfig as SFTLossConfig,
    SFTRun as SFTRun,
    sft_inside as sft_inside,
)
from dpo_jax.config.shipped import derive as derive
from dpo_jax.config.talk import ChatRun as ChatRun, ServeRun as ServeRun, TalkOptions as TalkOptions
from dpo_jax.config.training import (
    HoldoutRun as HoldoutRun,
    JudgedRun as JudgedRun,
    SampledRun as SampledRun,
    TrainingRun as TrainingRun,
    is_url as is_url,
)
from dpo_jax.config.vocabulary import ExtendVocabRun as ExtendVocabRun
from dpo_jax.config.win_rate import WinRateRun as WinRateRun
from dpo_jax.config.zephyr import ZephyrRun as ZephyrRun
